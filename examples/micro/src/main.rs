//! Continues a prompt. Arguments, from the debugger or qemu: how many tokens to generate, then the tokens of the
//! prompt, which `halite tokenize` prints. At the end it prints a checksum of all logits.

#![no_std]
#![no_main]

use halite_micro::image::checksum;
use halite_micro::{Error, Image, Session, greedy};
use semihosting::{io, println, process};

#[cfg(target_arch = "arm")]
use cortex_m_rt::entry;
#[cfg(target_arch = "riscv32")]
use riscv_rt::entry;

/// The model, in flash; aligned, because it is read as words.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);
static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("HALITE_IMAGE")));

/// All memory that it needs.
const WORDS: usize = number(env!("HALITE_MEMORY_WORDS"));
static mut MEMORY: [u32; WORDS] = [0; WORDS];

const fn number(text: &str) -> usize {
    let (digits, mut n, mut i) = (text.as_bytes(), 0, 0);
    while i < digits.len() {
        n = 10 * n + (digits[i] - b'0') as usize;
        i += 1;
    }
    n
}

#[entry]
fn main() -> ! {
    let memory: *mut [u32; WORDS] = &raw mut MEMORY;
    // SAFETY: this is the only reference, and `main` runs once.
    match run(unsafe { &mut *memory }) {
        Ok(()) => process::exit(0),
        Err(error) => {
            println!("{error}");
            process::exit(1)
        }
    }
}

fn run(memory: &mut [u32]) -> Result<(), Error> {
    let image = Image::new(&IMAGE.0)?;
    image.verify()?;
    let mut session = Session::new(image, memory)?;
    let mut logits_sum = 0;
    let args = semihosting::experimental::env::args::<1024>().expect("arguments");
    let mut numbers = args.filter_map(|arg| arg.ok()?.parse::<u32>().ok());
    let count = numbers.next().unwrap_or(16);
    let mut token = None;
    for prompt in numbers {
        let logits = session.step(&[prompt])?;
        logits_sum = sum(logits_sum, logits);
        token = greedy(logits);
    }
    for _ in 1..count {
        let Some(next) = token.filter(|&token| !image.is_end(token)) else { break };
        text(image.text(next));
        let logits = session.step(&[next])?;
        logits_sum = sum(logits_sum, logits);
        token = greedy(logits);
    }
    token.into_iter().for_each(|token| text(image.text(token)));
    println!("\nlogits {logits_sum:08x}, memory {} bytes", 4 * WORDS);
    #[cfg(target_arch = "arm")]
    println!("stack {} bytes", stack());
    Ok(())
}

/// Prints bytes as they are: a character may come in parts.
fn text(bytes: &[u8]) {
    use semihosting::io::Write;
    if let Ok(mut out) = io::stdout() {
        let _ = out.write_all(bytes);
    }
}

/// The checksum of what it was before and of the logits.
fn sum(before: u32, logits: &[f32]) -> u32 {
    let pair = [before, checksum(bytemuck::cast_slice(logits))];
    checksum(bytemuck::cast_slice(&pair))
}

/// The most bytes of stack that were in use: below, the runtime's paint is left.
#[cfg(target_arch = "arm")]
fn stack() -> usize {
    unsafe extern "C" {
        static mut _stack_start: u32;
        static mut _stack_end: u32;
    }
    let (top, mut at) = (&raw const _stack_start, &raw const _stack_end);
    // SAFETY: the stack lies between these, and the part below the stack pointer is only read.
    while at < top && unsafe { at.read_volatile() } == 0xcccc_cccc {
        at = at.wrapping_add(1);
    }
    top as usize - at as usize
}
