use halite::kernels::formats::Format;
use halite::passes;
use halite::program::Program;
use halite::synth::{Formats, Synth, shape};
use halite_profiles::profile::Profile;
use halite_sim::{Chip, Numerics, step};
fn model(name: &str, format: Format) -> Program {
    let formats = Formats::of(format);
    let model = Synth::new(shape(name).unwrap(), formats, 0).unwrap().model().unwrap();
    passes::fuse(&model.program(Default::default(), 4096).unwrap(), halite_sim::FUSIONS)
}
#[test]
fn try_it() {
    let base = Profile::open("maia-100").unwrap();
    for (name, format) in [("llama-2-7b", Format::F16), ("llama-2-7b", Format::Q4_0), ("llama-2-7b", Format::Q4_K), ("llama-1.1b", Format::Q8_0), ("moe-8x2", Format::MXFP4)] {
        let program = model(name, format);
        for kb in [16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0] {
            let profile = base.with("memory.tsram.capacity_bytes", kb * 1024.0).unwrap().with("chip.clusters", 32.0).unwrap();
            let chip = Chip::new(profile, Numerics::Exact, None).unwrap();
            for spans in [vec![(0u32, 1u32)], vec![(300, 1); 8], vec![(0, 512)]] {
                let t0 = std::time::Instant::now();
                let closed = step::closed(&chip, &program, &spans, true);
                let took = t0.elapsed();
                let t0 = std::time::Instant::now();
                let events = step::time(&chip, &program, &spans, true);
                let took2 = t0.elapsed();
                match (closed, events) {
                    (Ok(c), Ok(e)) => { let e = e.total().seconds; println!("{name} {format:?} {kb} KB {:?}x{}: closed {:.3} ms ({took:?}), events {:.3} ms ({took2:?}), {:+.3}", spans[0], spans.len(), c*1e3, e*1e3, c/e-1.0) }
                    (Err(e), _) => println!("{name} {format:?} {kb} KB: {e}"),
                    (c, Err(e)) => println!("{name} {format:?} {kb} KB closed {c:?}: {e}"),
                }
            }
        }
    }
}
