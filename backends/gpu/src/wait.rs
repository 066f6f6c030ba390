//! Waiting: for futures of wgpu, and for callbacks of the device.

/// What a callback calls once, with its result.
pub(super) type Done<T> = Box<dyn FnOnce(T) + Send>;

pub(super) use system::{block_on, callback, why_not};

#[cfg(not(target_family = "wasm"))]
mod system {
    use super::Done;
    use std::sync::mpsc;
    use std::time::Duration;

    pub use pollster::block_on;

    /// How long a callback may take after the device is done.
    const CALLBACK: Duration = Duration::from_secs(60);

    /// Why this thread cannot wait.
    pub fn why_not() -> Option<&'static str> {
        None
    }

    /// Waits until the device is done with all submitted work, and has called what `start` is given.
    pub fn callback<T: Send + 'static>(
        device: &wgpu::Device,
        start: impl FnOnce(Done<T>),
    ) -> Result<T, String> {
        let (done, result) = mpsc::channel();
        // Nobody listens any more only after the time below.
        start(Box::new(move |value| _ = done.send(value)));
        let polled = device.poll(wgpu::PollType::wait_indefinitely());
        polled.map_err(|e| e.to_string())?;
        // Another thread that waits for the device may have taken the callback, and be about to call it.
        result.recv_timeout(CALLBACK).map_err(|_| "the device did not call back".into())
    }
}

/// In a browser, the thread that waits is the one that runs callbacks. The module is suspended meanwhile, by JavaScript Promise
/// Integration, and so its callers in JavaScript get a promise. The module that the host gives as `halite` has three functions:
/// `can_suspend`, `suspend`, which suspends until `wake` is called, and returns at once if that was called since, and `wake`.
#[cfg(target_family = "wasm")]
#[allow(unsafe_code)]
mod system {
    use super::Done;
    use std::pin::pin;
    use std::sync::{Arc, mpsc};
    use std::task::{Context, Poll, Wake, Waker};

    #[link(wasm_import_module = "halite")]
    unsafe extern "C" {
        safe fn can_suspend() -> u32;
        safe fn suspend();
        safe fn wake();
    }

    /// Why this thread cannot wait.
    pub fn why_not() -> Option<&'static str> {
        (can_suspend() == 0).then_some("it has no JavaScript Promise Integration")
    }

    struct Host;

    impl Wake for Host {
        fn wake(self: Arc<Self>) {
            wake();
        }
    }

    /// Waits for a future.
    pub fn block_on<F: Future>(future: F) -> F::Output {
        let waker = Waker::from(Arc::new(Host));
        let mut context = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            match future.as_mut().poll(&mut context) {
                Poll::Ready(output) => return output,
                Poll::Pending => suspend(),
            }
        }
    }

    /// Waits until the device has called what `start` is given.
    pub fn callback<T: Send + 'static>(_: &wgpu::Device, start: impl FnOnce(Done<T>)) -> Result<T, String> {
        let (done, result) = mpsc::channel();
        start(Box::new(move |value| {
            _ = done.send(value);
            wake();
        }));
        loop {
            match result.try_recv() {
                Ok(value) => return Ok(value),
                Err(mpsc::TryRecvError::Empty) => suspend(),
                Err(mpsc::TryRecvError::Disconnected) => return Err("the device dropped a callback".into()),
            }
        }
    }
}
