//! Recordings as files: safetensors, with the program as JSON in its metadata, so that other tools can read the data.

use std::collections::HashMap;
use std::sync::Arc;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::{Output, Recording, SpanData, StepData};
use crate::error::{Error, Result};
use crate::passes;
use crate::program::Program;

/// The key of the description in the file's metadata.
const KEY: &str = "halite.recording";
/// The version of the description.
const VERSION: u32 = 1;

/// What a recording is besides its data.
#[derive(Serialize, Deserialize)]
struct Description {
    version: u32,
    program: Program,
    bound: f64,
    steps: Vec<StepDescription>,
    expected: Option<Vec<OutputDescription>>,
}

#[derive(Serialize, Deserialize)]
struct StepDescription {
    /// First position, tokens, page tables.
    spans: Vec<(u32, u32, Vec<Vec<u32>>)>,
    tokens: Vec<u32>,
    outputs: Vec<u32>,
}

#[derive(Serialize, Deserialize)]
struct OutputDescription {
    step: usize,
    name: String,
    integers: bool,
    cols: usize,
}

fn wrong(what: impl std::fmt::Display) -> Error {
    Error::argument("recording", "a file that `halite bisect` wrote", what)
}

impl Recording {
    /// Writes the recording as a file's bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] for a program with numbers that JSON does not have.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let steps = self.steps.iter().map(|step| StepDescription {
            spans: step.spans.iter().map(|s| (s.start, s.len, s.tables.clone())).collect(),
            tokens: step.tokens.clone(),
            outputs: step.outputs.clone(),
        });
        let described = |o: &Output| {
            let Output { step, ref name, integers, cols, .. } = *o;
            OutputDescription { step, name: name.clone(), integers, cols }
        };
        let description = Description {
            version: VERSION,
            program: Program::clone(&self.program),
            bound: self.bound,
            steps: steps.collect(),
            expected: self.expected.as_ref().map(|all| all.iter().map(described).collect()),
        };
        let text = serde_json::to_string(&description).map_err(wrong)?;
        let mut data: Vec<(String, Dtype, &[u8])> = Vec::new();
        let bytes = self.weights.iter().enumerate().map(|(n, bytes)| (format!("weight.{n}"), bytes));
        let states = self.states.iter().enumerate().map(|(n, bytes)| (format!("state.{n}"), bytes));
        data.extend(bytes.chain(states).map(|(name, bytes)| (name, Dtype::U8, &bytes[..])));
        for (s, step) in self.steps.iter().enumerate() {
            for (n, words) in step.inputs.iter().enumerate() {
                let Some(words) = words else { continue };
                data.push((format!("step.{s}.input.{n}"), Dtype::F32, bytemuck::cast_slice(words)));
            }
        }
        for (n, output) in self.expected.iter().flatten().enumerate() {
            let dtype = if output.integers { Dtype::I32 } else { Dtype::F32 };
            data.push((format!("expected.{n}"), dtype, bytemuck::cast_slice(&output.words)));
        }
        let views = data.into_iter().map(|(name, dtype, bytes)| {
            let elements = if dtype == Dtype::U8 { bytes.len() } else { bytes.len() / 4 };
            TensorView::new(dtype, vec![elements], bytes).map(|view| (name, view)).map_err(wrong)
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([(KEY.to_owned(), text)]);
        safetensors::serialize(views, Some(metadata)).map_err(wrong)
    }

    /// Reads a recording from a file's bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] if it is none, [`Error::Program`] if its program is not valid.
    pub fn from_bytes(bytes: &[u8]) -> Result<Recording> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(wrong)?;
        let metadata = header.metadata().as_ref();
        let text = metadata
            .and_then(|all| all.get(KEY))
            .ok_or_else(|| wrong(format!("no `{KEY}` in its metadata")))?;
        let description: Description = serde_json::from_str(text).map_err(wrong)?;
        if description.version != VERSION {
            return Err(wrong(format!("version {}, expected {VERSION}", description.version)));
        }
        let file = SafeTensors::deserialize(bytes).map_err(wrong)?;
        let program = description.program;
        program.validate()?;
        let raw = |name: String, need: Option<u64>| {
            let bytes = file.tensor(&name).map_err(|e| wrong(format!("`{name}`: {e}")))?.data();
            match need {
                Some(need) if need != bytes.len() as u64 => {
                    Err(wrong(format!("{} bytes of `{name}`, expected {need}", bytes.len())))
                }
                _ => Ok(bytes),
            }
        };
        let words = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        let weights = program.weights.iter().enumerate().map(|(n, &id)| {
            let need = program.fixed_bytes(id).ok_or_else(|| wrong(format!("weight {n} without a size")))?;
            Ok(raw(format!("weight.{n}"), Some(need))?.to_vec())
        });
        let weights = weights.collect::<Result<Vec<_>>>()?;
        let states = (0..program.states.len()).map(|n| Ok(raw(format!("state.{n}"), None)?.to_vec()));
        let states = states.collect::<Result<Vec<_>>>()?;
        let mut steps = Vec::new();
        for (s, step) in description.steps.into_iter().enumerate() {
            let inputs = program.io.iter().enumerate().map(|(n, &id)| {
                let mut written = false;
                program.ops().for_each(|(_, op)| op.outputs(&mut |out| written |= out == id));
                if written {
                    return Ok(None);
                }
                let t = program.tensor(id);
                let rows = passes::rows(t.rows, step.tokens.len() as u32, step.outputs.len() as u32);
                Ok(Some(words(raw(format!("step.{s}.input.{n}"), Some(4 * rows * u64::from(t.cols)))?)))
            });
            let inputs = inputs.collect::<Result<Vec<_>>>()?;
            let spans = step.spans.into_iter();
            let spans = spans.map(|(start, len, tables)| SpanData { start, len, tables }).collect();
            steps.push(StepData { spans, tokens: step.tokens, outputs: step.outputs, inputs });
        }
        let expected = match description.expected {
            None => None,
            Some(described) => {
                let outputs = described.into_iter().enumerate().map(|(n, d)| {
                    let words = words(raw(format!("expected.{n}"), None)?);
                    Ok(Output { step: d.step, name: d.name, integers: d.integers, cols: d.cols, words })
                });
                Some(outputs.collect::<Result<Vec<_>>>()?)
            }
        };
        let program = Arc::new(program);
        Ok(Recording { program, weights, states, steps, bound: description.bound, expected })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::reference::Reference;
    use crate::conformance::{cases, check_recording};

    /// Every kind of case survives being written and read, and a file that is cut or changed is an error or another
    /// recording, never a panic.
    #[test]
    fn recordings_are_read_as_they_were_written() {
        for case in cases().iter().step_by(23) {
            let mut recording = case.record(7).unwrap();
            recording.expected = Some(recording.run(&Reference::new()).unwrap());
            let bytes = recording.to_bytes().unwrap();
            let read = Recording::from_bytes(&bytes).unwrap();
            // Compared as bytes, because inputs may be NaN.
            assert_eq!(read.to_bytes().unwrap().len(), bytes.len(), "{}", case.name);
            assert_eq!(read.program, recording.program);
            assert!(check_recording(&Reference::new(), &read).same_bits(), "{}", case.name);
            assert!(Recording::from_bytes(&bytes[..bytes.len() - 1]).is_err(), "{}", case.name);
            for at in (0..bytes.len().min(4000)).step_by(37) {
                let mut changed = bytes.clone();
                changed[at] ^= 0x11;
                if let Ok(other) = Recording::from_bytes(&changed) {
                    let _ = other.run(&Reference::new());
                }
            }
        }
    }
}
