//! Finds and opens devices.

use std::fmt;

use super::lower::Tuning;
use super::{failed, wait};
use halite::error::Result;
use halite_shaders::{Cooperative, Paths};

const MATRICES: wgpu::Features = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;

/// Where devices are looked for.
#[cfg(not(target_family = "wasm"))]
const TRIED: &str =
    "Vulkan (needs a loader, libvulkan1, and a driver, such as mesa-vulkan-drivers), Metal and DX12";
#[cfg(target_family = "wasm")]
const TRIED: &str = "WebGPU, which this browser does not have, has switched off, or has no adapter for";

/// A device that can be opened.
#[derive(Debug)]
pub struct Adapter {
    adapter: wgpu::Adapter,
    info: wgpu::AdapterInfo,
}

/// The APIs to search for devices.
fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN
        | wgpu::Backends::METAL
        | wgpu::Backends::DX12
        | wgpu::Backends::BROWSER_WEBGPU;
    wgpu::Instance::new(descriptor)
}

/// Lists all devices, the fastest kind first.
pub fn adapters() -> Vec<Adapter> {
    if wait::why_not().is_some() {
        return Vec::new();
    }
    let instance = instance();
    let found = wait::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let mut found: Vec<Adapter> = found
        .into_iter()
        .map(|adapter| Adapter { info: adapter.get_info(), adapter })
        .filter(|a| {
            a.adapter.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
        })
        .collect();
    let rank = |a: &Adapter| match a.info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    found.sort_by_key(rank);
    found
}

/// Finds a device by index or part of its name; without one, returns the first.
pub(super) fn choose(device: Option<&str>) -> Result<Adapter> {
    if let Some(why) = wait::why_not() {
        return Err(failed(format!("this browser cannot wait for a device: {why}")));
    }
    let mut found = adapters();
    if found.is_empty() {
        return Err(failed(format!("no device: tried {TRIED}")));
    }
    let Some(device) = device else { return Ok(found.swap_remove(0)) };
    let lower = device.to_lowercase();
    let place = match device.parse::<usize>() {
        Ok(n) => (n < found.len()).then_some(n),
        Err(_) => found.iter().position(|a| a.to_string().to_lowercase().contains(&lower)),
    };
    let Some(place) = place else {
        let list: Vec<String> = found.iter().enumerate().map(|(i, a)| format!("{i}: {a}")).collect();
        return Err(failed(format!("no device `{device}`; available: {}", list.join(", "))));
    };
    Ok(found.swap_remove(place))
}

impl Adapter {
    pub(super) fn info(&self) -> &wgpu::AdapterInfo {
        &self.info
    }

    /// Returns the features that shaders can use.
    pub(super) fn paths(&self) -> Paths {
        let features = self.adapter.features();
        let f16 = features.contains(wgpu::Features::SHADER_F16);
        Paths {
            subgroups: features.contains(wgpu::Features::SUBGROUP),
            integer: true,
            f16,
            cooperative: self.cooperative().filter(|_| f16),
        }
    }

    /// Returns the largest cooperative matrices of f16 with f32 sums.
    fn cooperative(&self) -> Option<Cooperative> {
        use wgpu::CooperativeScalarType::{F16, F32};
        if !self.adapter.features().contains(MATRICES | wgpu::Features::SUBGROUP) {
            return None;
        }
        let square = |p: &wgpu::CooperativeMatrixProperties| {
            let same = p.m_size == p.n_size && p.m_size == p.k_size;
            (same && (p.ab_type, p.cr_type) == (F16, F32) && matches!(p.m_size, 8 | 16)).then_some(p.m_size)
        };
        let side = self.adapter.cooperative_matrix_properties().iter().filter_map(square).max()?;
        let subgroup = self.info.subgroup_max_size;
        let fits = 8 * subgroup <= self.adapter.limits().max_compute_invocations_per_workgroup;
        fits.then_some(Cooperative { side, subgroup })
    }

    /// Whether the device runs shaders on the CPU with wide vectors, and so with a fast compiler: compilers
    /// for narrow vectors take minutes and gigabytes for long shaders.
    fn is_wide_cpu(&self) -> bool {
        self.info.device_type == wgpu::DeviceType::Cpu && self.info.subgroup_max_size >= 8
    }

    /// Returns workgroup sizes for the device.
    pub(super) fn tuning(&self) -> Tuning {
        match self.info.device_type {
            wgpu::DeviceType::DiscreteGpu => Tuning::DISCRETE,
            _ if self.is_wide_cpu() => Tuning::CPU,
            _ => Tuning::INTEGRATED,
        }
    }

    /// Returns facts about the device for people: names and values.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let limits = self.adapter.limits();
        let features = self.adapter.features();
        let yes = |feature| if features.contains(feature) { "yes" } else { "no" }.to_owned();
        vec![
            ("driver", format!("{} {}", self.info.driver, self.info.driver_info)),
            ("kind", format!("{:?}", self.info.device_type)),
            (
                "subgroups",
                match features.contains(wgpu::Features::SUBGROUP) {
                    true => format!("{} to {}", self.info.subgroup_min_size, self.info.subgroup_max_size),
                    false => "no".into(),
                },
            ),
            ("f16", yes(wgpu::Features::SHADER_F16)),
            ("timestamps", yes(wgpu::Features::TIMESTAMP_QUERY)),
            (
                "matrix units",
                match self.cooperative() {
                    Some(Cooperative { side, .. }) => format!("{side} by {side}, f16"),
                    None => "no".into(),
                },
            ),
            ("largest buffer", format!("{} MiB", limits.max_buffer_size >> 20)),
            ("largest binding", format!("{} MiB", limits.max_storage_buffer_binding_size >> 20)),
            ("bindings of a shader", limits.max_storage_buffers_per_shader_stage.to_string()),
            ("workgroup memory", format!("{} KiB", limits.max_compute_workgroup_storage_size >> 10)),
            ("invocations of a workgroup", limits.max_compute_invocations_per_workgroup.to_string()),
        ]
    }

    /// Opens the device for these shaders.
    pub(super) fn open(&self, paths: Paths) -> Result<(wgpu::Device, wgpu::Queue)> {
        let mut features =
            wgpu::Features::SUBGROUP | wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::PIPELINE_CACHE;
        features.set(wgpu::Features::SHADER_F16, paths.f16);
        features.set(MATRICES, paths.cooperative.is_some());
        let experimental_features = match paths.cooperative {
            // SAFETY: only callers that set `GpuOptions::cooperative`, whose docs name the risk, enable the
            // experimental feature. The shader that uses it passes naga's validation, and addresses its own
            // workgroup memory within constant bounds.
            #[allow(unsafe_code)]
            Some(_) => unsafe { wgpu::ExperimentalFeatures::enabled() },
            None => wgpu::ExperimentalFeatures::disabled(),
        };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("halite"),
            required_features: self.adapter.features() & features,
            experimental_features,
            // All limits of the adapter: unrequested ones cannot be used.
            required_limits: self.adapter.limits(),
            ..Default::default()
        };
        wait::block_on(self.adapter.request_device(&descriptor))
            .map_err(|e| failed(format!("{self} cannot be opened: {e}")))
    }
}

impl fmt::Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Browsers do not name devices.
        let name = if self.info.name.is_empty() { "GPU" } else { &self.info.name };
        write!(f, "{name} ({:?})", self.info.backend)
    }
}
