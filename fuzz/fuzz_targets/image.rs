//! Images for microcontrollers: any bytes are refused, or run.
#![no_main]

use halite_micro::{Image, Session};

/// Words of memory that a case may take.
const MOST_WORDS: usize = 1 << 18;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // Images start at a whole word.
    let mut words = vec![0u32; bytes.len() / 4];
    bytemuck::cast_slice_mut(&mut words).copy_from_slice(&bytes[..bytes.len() / 4 * 4]);
    let Ok(image) = Image::new(bytemuck::cast_slice(&words)) else { return };
    if image.memory_words() > MOST_WORDS {
        return;
    }
    let mut memory = vec![0; image.memory_words()];
    let Ok(mut session) = Session::new(image, &mut memory) else { return };
    for tokens in [&[0][..], &[1, 2], &[0]] {
        let _ = session.step(tokens);
    }
    let _ = session.rewind(1);
    let _ = session.prefill(&[0; 70]);
    let _ = (image.text(1), image.is_end(1), image.verify());
});
