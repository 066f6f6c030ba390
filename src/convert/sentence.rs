//! The settings of sentence-transformers: pooling, the maximum tokens of a text, and the modules after the model.

use std::path::Path;

use serde_json::Value;

use super::folder::{Json, has, is_plain};
use super::options::only;
use super::wordpiece::lowercases;
use crate::embed::MAX_TEXT_TOKENS;
use crate::error::Result;
use crate::gguf::write::Writer;

const MODULES: &str = "modules.json";
/// Where the pooling is, if no list of modules says so.
const POOLING: &str = "1_Pooling";

/// What a family has to know of them.
pub(super) struct Sentence<'s> {
    pub(super) architecture: &'s str,
    /// Positions of the model.
    pub(super) positions: u32,
    /// Matrices after the pooling that the family has, by their names in GGUF files.
    pub(super) dense: &'s [&'static str],
    /// Whether the tokenizer is WordPiece.
    pub(super) word_pieces: bool,
}

/// What they come to.
#[derive(Default)]
pub(super) struct Found {
    /// Files of weights, and what stands before their names.
    pub(super) beside: Vec<(String, String)>,
    pub(super) left_out: Vec<String>,
}

/// Whether a folder has any.
pub(super) fn is_there(folder: &Path) -> bool {
    has(folder, MODULES) || has(folder, POOLING)
}

impl Sentence<'_> {
    /// Writes the keys.
    pub(super) fn write(&self, folder: &Path, w: &mut Writer) -> Result<Found> {
        self.max_tokens(folder, w)?;
        let mut found = Found::default();
        let modules = Json::open_if_there(folder, MODULES)?;
        let mut known = vec!["Transformer", "Pooling", "Dense", "Normalize"];
        known.retain(|kind| *kind != "Dense" || !self.dense.is_empty());
        let (mut normalizes, mut pooling) = (modules.value.is_null(), None);
        let list = modules.value.as_array().map_or(&[][..], |list| &list[..]);
        let order = format!("{} in this order", known.join(", "));
        // What a text becomes a vector by.
        if list.len() < 2 && !normalizes {
            return Err(modules.wrong("type", &order, format!("{} modules", list.len())));
        }
        let mut last = 0;
        for (at, module) in list.iter().enumerate() {
            let kind = module.get("type").and_then(Value::as_str).unwrap_or_default();
            let kind = kind.rsplit('.').next().unwrap_or_default();
            let Some(place) = known.iter().position(|known| *known == kind) else {
                return Err(modules.wrong("type", &format!("one of {}", known.join(", ")), kind));
            };
            let fits = if at < 2 { place == at } else { place > last || kind == "Dense" && place == last };
            if !fits {
                return Err(modules.wrong("type", &order, format!("{kind} at {at}")));
            }
            last = place;
            let path = module.get("path").and_then(Value::as_str);
            let path = path.unwrap_or(if kind == "Pooling" { POOLING } else { "" });
            match kind {
                "Normalize" => normalizes = true,
                "Transformer" if !path.is_empty() => {
                    return Err(modules.wrong("path", "none for the Transformer", path));
                }
                "Pooling" | "Dense" if !is_plain(path) => {
                    return Err(modules.wrong("path", "a folder of the folder", path));
                }
                "Pooling" => pooling = Some(path.to_owned()),
                "Dense" if found.beside.len() == self.dense.len() => {
                    let expected = format!("at most {} of the kind Dense", self.dense.len());
                    return Err(modules.wrong("type", &expected, found.beside.len() + 1));
                }
                "Dense" => self.dense(folder, path, &mut found, w)?,
                _ => {}
            }
        }
        let pooling = pooling.or_else(|| has(folder, POOLING).then(|| POOLING.to_owned()));
        match pooling.map(|path| self::pooling(folder, &path)).transpose()? {
            Some(pooling) => w.entry(&format!("{}.pooling_type", self.architecture), pooling)?,
            None => found.left_out.push(format!("{POOLING} is not there: the file states no pooling")),
        }
        if !normalizes {
            found.left_out.push(
                "modules.json: vectors are not divided by their length: `halite embed` needs --no-normalize for that"
                    .to_owned(),
            );
        }
        let prompts = Json::open_if_there(folder, "config_sentence_transformers.json")?;
        if prompts.get("default_prompt_name").is_some() {
            let what = "config_sentence_transformers.json: key `default_prompt_name` is left out: write the prompt before texts";
            found.left_out.push(what.to_owned());
        }
        Ok(found)
    }

    fn max_tokens(&self, folder: &Path, w: &mut Writer) -> Result<()> {
        let about = Json::open_if_there(folder, "sentence_bert_config.json")?;
        let tokenizer = Json::open_if_there(folder, "tokenizer_config.json")?;
        // Without a limit of its own, sentence-transformers uses the tokenizer's.
        let (from, key) = match about.get("max_seq_length") {
            Some(_) => (&about, "max_seq_length"),
            None => (&tokenizer, "model_max_length"),
        };
        // A tokenizer without a limit states a huge number, such as 1e30.
        let max_tokens = from.optional_f64(key)?.filter(|max_tokens| *max_tokens < f64::from(self.positions));
        if let Some(max_tokens) = max_tokens {
            if max_tokens.fract() != 0.0 || max_tokens < 3.0 {
                return Err(from.missing(key, "a whole number of tokens, at least 3"));
            }
            w.entry(MAX_TEXT_TOKENS, max_tokens as u32)?;
        }
        if !self.word_pieces || !lowercases(&tokenizer)? {
            only(&about, "do_lower_case", &false.into())?;
        }
        Ok(())
    }

    /// A matrix after the pooling, without what a module has unless it says otherwise: a bias and an activation.
    fn dense(&self, folder: &Path, path: &str, found: &mut Found, w: &mut Writer) -> Result<()> {
        let config = Json::open(folder, &format!("{path}/config.json"))?;
        for (key, value) in
            [("bias", false.into()), ("activation_function", "torch.nn.modules.linear.Identity".into())]
        {
            only(&config, key, &value)?;
            if config.get(key).is_none() {
                return Err(config.missing(key, &value.to_string()));
            }
        }
        let Some(name) = self.dense.get(found.beside.len()) else { return Ok(()) };
        for (key, from) in [("feat_in", "in_features"), ("feat_out", "out_features")] {
            w.entry(&format!("{}.{name}_{key}", self.architecture), config.u32(from)?)?;
        }
        found.beside.push((format!("{path}/model.safetensors"), format!("{name}.")));
        Ok(())
    }
}

/// Returns the pooling, as a value of the key `pooling_type`.
fn pooling(folder: &Path, path: &str) -> Result<u32> {
    let config = Json::open(folder, &format!("{path}/config.json"))?;
    let fields = config.value.as_object().into_iter().flatten();
    let on = fields.filter(|(_, value)| **value == true).map(|(key, _)| key.as_str());
    let mut modes: Vec<&str> = on.filter_map(|key| key.strip_prefix("pooling_mode_")).collect();
    // Newer versions name the mode.
    modes.extend(config.value.get("pooling_mode").and_then(Value::as_str));
    match modes[..] {
        ["mean_tokens" | "mean"] => Ok(1),
        ["cls_token" | "cls"] => Ok(2),
        ["lasttoken"] => Ok(3),
        _ => Err(config.wrong(
            "pooling_mode_*",
            "one of mean_tokens, cls_token, lasttoken",
            format!("{modes:?}"),
        )),
    }
}
