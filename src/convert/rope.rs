//! Rotary position embeddings: converts the frequencies and the context scaling of config.json to GGUF keys.

use super::folder::Json;
use crate::error::Result;
use crate::gguf::write::Writer;

/// The RoPE settings of a model.
pub(super) struct Rope<'c> {
    pub(super) config: &'c Json,
    pub(super) architecture: &'c str,
    /// Elements of a head's key.
    pub(super) head_dim: u32,
    /// Base of the frequencies if the config has none.
    pub(super) default_base: Option<f64>,
    /// The same of layers with a window.
    pub(super) default_local: Option<f64>,
}

/// The factor of a pair that does not rotate: its frequency is 0 in any context.
const STILL: f32 = 1e30;

/// Vectors to add to the file, with their names.
type Vectors = Vec<(&'static str, Vec<f32>)>;

impl Rope<'_> {
    /// Writes the keys, and returns the frequency factors, which become tensors.
    ///
    /// A config has either `rope_parameters` (possibly one for each kind of layer), or the older
    /// `rope_theta`, `rope_local_base_freq` and `rope_scaling`, which some families call otherwise.
    pub(super) fn write(&self, w: &mut Writer) -> Result<Vectors> {
        let Rope { config, architecture, .. } = self;
        let entry = |name: &str| format!("{architecture}.rope.{name}");
        let (given, older) = (config.object("rope_parameters")?, config.object("rope_scaling")?);
        // Families differ in which of them counts.
        if let (Some(given), Some(older)) = (&given, &older)
            && given.value != older.value
        {
            return Err(config.wrong("rope_scaling", "the same as rope_parameters", &older.value));
        }
        let given = given.or(older);
        let of_layers = |kind: &str| given.as_ref().map(|given| given.object(kind)).transpose();
        let (full, windowed) =
            (of_layers("full_attention")?.flatten(), of_layers("sliding_attention")?.flatten());
        let parameters = full.as_ref().or(given.as_ref());
        let number = |name: &str| match parameters.map(|p| p.optional_f64(name)).transpose()?.flatten() {
            Some(value) => Ok(Some(value)),
            None => config.optional_f64(name),
        };
        let old = |names: &[&str]| match names.iter().find(|name| config.get(name).is_some()) {
            Some(name) => config.optional_f64(name),
            None => Ok(None),
        };
        let base = match number("rope_theta")? {
            Some(base) => Some(base),
            None => old(&["global_rope_theta", "rotary_emb_base"])?.or(self.default_base),
        };
        let base = base.ok_or_else(|| config.missing("rope_theta", "a number"))?;
        let base = self.enlarged(parameters, base)?;
        w.entry(&entry("freq_base"), base as f32)?;
        if let Some(windowed) = &windowed {
            let kind = kind(windowed)?;
            if !matches!(kind, "default" | "none") {
                return Err(windowed.wrong("rope_type", "default", kind));
            }
        }
        let local = match &windowed {
            Some(windowed) => windowed.optional_f64("rope_theta")?,
            None => old(&["rope_local_base_freq", "local_rope_theta"])?,
        };
        if let Some(local) = local.or(self.default_local) {
            w.entry(&entry("freq_base_swa"), local as f32)?;
        }
        let part = match number("partial_rotary_factor")? {
            Some(part) => Some(part),
            None => old(&["rotary_pct"])?,
        };
        if let Some(part) = part.filter(|part| !(0.0..=1.0).contains(part)) {
            return Err(config.wrong("partial_rotary_factor", "0 to 1", part));
        }
        if let Some(windowed) = &windowed {
            // Files have a number of pairs for all layers; Gemma 4's layers with a window rotate all.
            let all = if *architecture == "gemma4" { 1.0 } else { part.unwrap_or(1.0) };
            let own = match windowed.optional_f64("partial_rotary_factor")? {
                Some(own) => own,
                None => config.optional_f64("partial_rotary_factor")?.unwrap_or(1.0),
            };
            if own != all {
                return Err(windowed.wrong("partial_rotary_factor", &all.to_string(), own));
            }
        }
        let rotated = match (part, config.optional_u32("rotary_dim")?) {
            (None, Some(rotated)) if rotated > self.head_dim => {
                return Err(config.wrong("rotary_dim", &format!("at most {}", self.head_dim), rotated));
            }
            (None, Some(rotated)) => rotated.into(),
            (part, _) => part.unwrap_or(1.0) * f64::from(self.head_dim),
        };
        let is_proportional = match parameters {
            Some(parameters) => kind(parameters)? == "proportional",
            None => false,
        };
        let pairs_of = if is_proportional { self.head_dim } else { rotated as u32 };
        w.entry(&entry("dimension_count"), pairs_of)?;
        match parameters {
            Some(parameters) => self.scaling(parameters, base, rotated as u32, w),
            None => Ok(Vec::new()),
        }
    }

    /// Hunyuan's scaling is a larger base.
    fn enlarged(&self, parameters: Option<&Json>, base: f64) -> Result<f64> {
        let Some(p) = parameters.filter(|_| self.architecture == "hunyuan-dense") else { return Ok(base) };
        match (kind(p)?, p.optional_f64("alpha")?) {
            ("dynamic", Some(alpha)) => {
                let dims = f64::from(self.head_dim);
                Ok(base * alpha.powf(dims / (dims - 2.0)))
            }
            _ => Ok(base),
        }
    }

    fn scaling(&self, p: &Json, base: f64, rotated: u32, w: &mut Writer) -> Result<Vectors> {
        let Rope { config, architecture, .. } = self;
        let entry = |name: &str| format!("{architecture}.rope.scaling.{name}");
        let original = match p.optional_u32("original_max_position_embeddings")? {
            Some(original) => Some(original),
            None => config.optional_u32("original_max_position_embeddings")?,
        };
        let attention_factor = p.optional_f64("attention_factor")?;
        match kind(p)? {
            "default" | "none" => Ok(Vec::new()),
            "mrope" if *architecture == "qwen2vl" => Ok(Vec::new()),
            "dynamic" if *architecture == "hunyuan-dense" && p.get("alpha").is_some() => Ok(Vec::new()),
            "linear" => {
                w.entry(&entry("type"), "linear")?;
                w.entry(&entry("factor"), p.f64("factor")? as f32)?;
                Ok(Vec::new())
            }
            // The frequencies are those of the whole head, but only the first pairs rotate.
            "proportional" => {
                let factor = p.optional_f64("factor")?.unwrap_or(1.0) as f32;
                let factors =
                    (0..self.head_dim / 2).map(|pair| if pair < rotated / 2 { factor } else { STILL });
                Ok(vec![("rope_freqs.weight", factors.collect())])
            }
            "llama3" => {
                let original = original
                    .ok_or_else(|| p.missing("original_max_position_embeddings", "a whole number"))?;
                let (factor, low, high) =
                    (p.f64("factor")?, p.f64("low_freq_factor")?, p.f64("high_freq_factor")?);
                let factors = (0..rotated / 2).map(|pair| {
                    let frequency = base.powf(-f64::from(2 * pair) / f64::from(rotated));
                    // Keep high frequencies, which rotate often within the original context, and
                    // interpolate low ones (Llama 3.1's `apply_scaling`).
                    let rotations = f64::from(original) * frequency / std::f64::consts::TAU;
                    let kept = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 / ((1.0 - kept) / factor + kept)) as f32
                });
                let factors: Vec<f32> = factors.collect();
                if !factors.iter().all(|factor| factor.is_finite() && *factor > 0.0) {
                    return Err(p.wrong("factor", "factors that give positive frequencies", factor));
                }
                Ok(vec![("rope_freqs.weight", factors)])
            }
            "yarn" => {
                for (key, only) in [("truncate", true), ("finetuned", true)] {
                    // gpt-oss's files have no key for it: the family's programs round, as llama.cpp's do.
                    if key == "truncate" && *architecture == "gpt-oss" {
                        continue;
                    }
                    if p.bool(key)?.is_some_and(|value| value != only) {
                        return Err(p.wrong(key, &only.to_string(), !only));
                    }
                }
                let factor = p.f64("factor")?;
                w.entry(&entry("type"), "yarn")?;
                w.entry(&entry("factor"), factor as f32)?;
                let original = match original {
                    Some(original) => original,
                    None => config.u32("max_position_embeddings")?,
                };
                w.entry(&entry("original_context_length"), original)?;
                for (key, from) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                    if let Some(value) = p.optional_f64(from)? {
                        w.entry(&entry(key), value as f32)?;
                    }
                }
                if *architecture == "deepseek2" {
                    // Its files have what scores grow by, and sines do not.
                    let all = p.f64("mscale_all_dim")?;
                    if all == 0.0 || p.optional_f64("mscale")? != Some(all) || attention_factor.is_some() {
                        return Err(
                            p.missing("mscale", "the same as mscale_all_dim, and no attention_factor")
                        );
                    }
                    w.entry(&entry("yarn_log_multiplier"), (0.1 * all) as f32)?;
                    return Ok(Vec::new());
                }
                if let ("mistral3", None, Some(1.0), Some(all)) = (
                    *architecture,
                    attention_factor,
                    p.optional_f64("mscale")?,
                    p.optional_f64("mscale_all_dim")?,
                ) && all > 0.0
                {
                    w.entry(&entry("yarn_log_multiplier"), all as f32)?;
                    return Ok(Vec::new());
                }
                let growth = |by: f64| if factor > 1.0 { 0.1 * by * factor.ln() + 1.0 } else { 1.0 };
                let default = growth(1.0);
                let computed = match (p.optional_f64("mscale")?, p.optional_f64("mscale_all_dim")?) {
                    (Some(scale), Some(all)) if scale != 0.0 && all != 0.0 => growth(scale) / growth(all),
                    _ => default,
                };
                let magnitude = attention_factor.unwrap_or(computed);
                if magnitude != default {
                    w.entry(&entry("attn_factor"), (magnitude / default) as f32)?;
                }
                Ok(Vec::new())
            }
            "longrope" | "su" => {
                let original = original
                    .ok_or_else(|| p.missing("original_max_position_embeddings", "a whole number"))?;
                let growth = f64::from(config.u32("max_position_embeddings")?) / f64::from(original.max(1));
                let factor = p.optional_f64("factor")?.unwrap_or(growth);
                let default = match factor > 1.0 {
                    true => (1.0 + factor.ln() / f64::from(original).ln()).sqrt(),
                    false => 1.0,
                };
                w.entry(&entry("type"), "longrope")?;
                w.entry(&entry("original_context_length"), original)?;
                w.entry(&entry("attn_factor"), attention_factor.unwrap_or(default) as f32)?;
                let factors = |name: &str| {
                    let list = p.optional_f32s(name)?;
                    list.ok_or_else(|| p.missing(name, "a list of numbers"))
                };
                Ok(vec![
                    ("rope_factors_long.weight", factors("long_factor")?),
                    ("rope_factors_short.weight", factors("short_factor")?),
                ])
            }
            other => {
                Err(p.wrong("rope_type", "default, linear, llama3, yarn, longrope or proportional", other))
            }
        }
    }
}

/// Returns the kind of scaling: `rope_type`, or `type` in older configs.
fn kind(parameters: &Json) -> Result<&str> {
    match ["rope_type", "type"].into_iter().find(|key| parameters.get(key).is_some()) {
        Some(key) => parameters.str(key),
        None => Ok("default"),
    }
}
