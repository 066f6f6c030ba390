//! Writes the small encoder of `tests/data/bert` as a GGUF file, for programs in C that embed texts.

use halite::kernels::formats::Format;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: encoder FILE")?;
    let mut file = std::fs::File::create(path)?;
    halite::convert::convert(&halite_testing::bert::folder(), Format::F32, &mut file, &mut |_| {})?;
    Ok(())
}
