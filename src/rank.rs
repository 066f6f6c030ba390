//! Scores of documents for a query, with a reranker: an encoder or a decoder whose file has a classification head (Nogueira &
//! Cho 2019).
//!
//! Query and document are one text, whose score an [`Embedder`] computes. A score does not depend on the other documents.

use crate::embed::Embedder;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::model::Pooling;
use crate::tokenizer::{EncodeOptions, Tokenizer};

/// Key of the text around query and document, which stand in it as `{query}` and `{document}`.
pub(crate) const TEMPLATE: &str = "tokenizer.chat_template.rerank";

/// The tokens of a query and a document as the reranker in a file expects them: within the file's template, whose control tokens
/// neither of them can forge, or with the vocabulary's separators.
///
/// # Errors
/// [`Error::Gguf`] for a template that is no text. [`Error::Model`] for token types that no separator divides.
pub fn tokens(gguf: &Gguf, tokenizer: &Tokenizer, query: &str, document: &str) -> Result<Vec<u32>> {
    let Some(template) = gguf.optional_str(TEMPLATE)? else {
        let pair = tokenizer.encode_pair(query, document);
        // A document has a type of its own, which begins behind the separator.
        if gguf.optional_u32("tokenizer.ggml.token_type_count")?.is_some_and(|types| types > 1)
            && let Some(separator) = gguf.optional_u32("tokenizer.ggml.seperator_token_id")?
            && pair.iter().filter(|&&id| id == separator).count() < 2
        {
            return Err(Error::Model(format!(
                "key `tokenizer.ggml.seperator_token_id`: expected the token behind query and document, got {separator}"
            )));
        }
        return Ok(pair);
    };
    // In one pass: a query may contain `{document}`.
    let mut text = String::new();
    let mut rest = template;
    while let Some(at) = rest.find('{') {
        let (before, here) = rest.split_at(at);
        text.push_str(before);
        let places = [("{query}", query), ("{document}", document)];
        let place = places.into_iter().find(|(place, _)| here.starts_with(place));
        let (len, quoted) =
            place.map_or((1, "{".into()), |(place, what)| (place.len(), tokenizer.quote(what)));
        text.push_str(&quoted);
        rest = &here[len..];
    }
    text.push_str(rest);
    Ok(tokenizer.encode(&text, EncodeOptions::default().add_special(false).parse_special(true)))
}

/// The same, with as much of the document as fits in so many tokens.
///
/// # Errors
/// As [`tokens`]; [`Error::Argument`] for a query that leaves no room.
pub fn fitting_tokens(
    gguf: &Gguf,
    tokenizer: &Tokenizer,
    query: &str,
    document: &str,
    most: usize,
) -> Result<Vec<u32>> {
    let pair = |document| tokens(gguf, tokenizer, query, document);
    let whole = pair(document)?;
    if whole.len() <= most {
        return Ok(whole);
    }
    let mut fits = pair("")?;
    if fits.len() > most {
        let expected = format!("at most {most} tokens with what stands around it");
        return Err(Error::argument("query", expected, fits.len()));
    }
    // Bisection: the first `short` characters fit, the first `long` do not.
    let ends: Vec<usize> = document.char_indices().map(|(at, _)| at).chain([document.len()]).collect();
    let (mut short, mut long) = (0, ends.len() - 1);
    while long - short > 1 {
        let middle = short + (long - short) / 2;
        let tokens = pair(&document[..ends[middle]])?;
        match tokens.len() <= most {
            true => (short, fits) = (middle, tokens),
            false => long = middle,
        }
    }
    Ok(fits)
}

/// The score of a pair of texts from those of its labels: that of the only one, or the first one's probability.
pub fn score(labels: &[f32]) -> f32 {
    let Some(&first) = labels.first() else { return 0.0 };
    if labels.len() == 1 {
        return first;
    }
    let sum: f64 = labels.iter().map(|&label| (f64::from(label) - f64::from(first)).exp()).sum();
    (1.0 / sum) as f32
}

/// The indices of scores, best first; equal ones stay in order.
pub fn best(scores: &[f32]) -> Vec<usize> {
    let mut best: Vec<usize> = (0..scores.len()).collect();
    best.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    best
}

impl Embedder {
    /// Returns the score of each document for a query, in order: higher is better. Scores are those of the model: with one label
    /// any number, with several the probability of the first. Truncation, if enabled, shortens documents.
    ///
    /// # Errors
    /// [`Error::Model`] for a model without a classification head; otherwise as [`Embedder::embed_tokens`].
    pub fn rank(
        &mut self,
        tokenizer: &Tokenizer,
        query: &str,
        documents: &[impl AsRef<str>],
    ) -> Result<Vec<f32>> {
        if self.pooling() != Pooling::Rank {
            let architecture = &self.model().hparams().architecture;
            return Err(Error::Model(format!(
                "no reranker: expected key `{architecture}.pooling_type` to be 4 (rank), and a classification head, got the pooling {:?}",
                self.pooling()
            )));
        }
        // Those that are too long are errors, unless documents are to be shortened.
        let most = if self.truncates() { self.max_text_tokens() as usize } else { usize::MAX };
        let gguf = self.model().gguf();
        let pairs =
            documents.iter().map(|document| fitting_tokens(gguf, tokenizer, query, document.as_ref(), most));
        let texts = pairs.collect::<Result<Vec<_>>>()?;
        Ok(self.embed_tokens(&texts)?.iter().map(|labels| score(labels)).collect())
    }
}
