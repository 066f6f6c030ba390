//! Numbers of a profile that change no time and no energy of a simulated chip.

use super::chip::Chip;
use halite_profiles::profile::Managed;

/// Keys that nothing reads, wherever they are, and why.
const KEYS: [(&str, &str); 5] = [
    ("banks", "memories are simulated without conflicts of banks"),
    ("dense_ops_per_s", "only compared with geometry, units and clock"),
    ("host_bytes_per_s", "weights are in device memory from the start"),
    ("line_bytes", "loads have the size that they ask for"),
    ("sparse_ops_per_s", "weights are dense, unless an estimate says otherwise"),
];

impl Chip {
    /// Returns the paths of the profile's numbers that change no time and no energy of a step, each with the reason.
    pub fn without_effect(&self) -> Vec<(&str, &'static str)> {
        let profile = &self.profile;
        let last = profile.memory.len() - 1;
        let memory = |name: &str| profile.memory.iter().position(|memory| memory.name == name);
        let why = |path: &str| -> Option<&'static str> {
            let (table, rest) = path.split_once('.')?;
            let key = path.rsplit('.').next()?;
            if let Some((_, why)) = KEYS.iter().find(|(name, _)| *name == key) {
                return Some(why);
            }
            match table {
                "interconnect" => Some("counts for several chips only"),
                "noc" if key == "hop_cycles" => Some("latencies of memories are those that a tile sees"),
                "launch" if key == "kernel_ns" && profile.launch.graph_kernel_ns.is_some() => {
                    Some("steps are recorded: graph_kernel_ns counts")
                }
                "dma" => {
                    let nearest = self.dma().map(|dma| dma.name.as_str());
                    let name = rest.split('.').next();
                    let dma = profile.dma.iter().find(|dma| Some(dma.name.as_str()) == name)?;
                    match key {
                        _ if name == nearest => None,
                        _ if dma.serves.is_none() => Some("tiles use the engines nearest to them"),
                        "engines" | "bytes_per_s" | "setup_ns" | "descriptor_ns" => None,
                        _ => Some("engines that tiles do not use directly take whole transfers"),
                    }
                }
                "memory" => {
                    let at = memory(rest.split('.').next()?)?;
                    match at {
                        _ if at == last => None,
                        _ if at == self.scratch => match key {
                            "latency_ns" => Some("units read a scratchpad without waiting"),
                            "write_bytes_per_s" => Some("writes to a scratchpad take the rate of reads"),
                            _ => None,
                        },
                        _ if profile.memory[at].managed == Managed::Software => None,
                        _ => Some("only its scope counts: its tiles share loads of the same bytes"),
                    }
                }
                _ => None,
            }
        };
        profile.quantities.iter().filter_map(|(path, _)| Some((path.as_str(), why(path)?))).collect()
    }
}
