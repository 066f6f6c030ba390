//! Answers that are written piece by piece, as server-sent events or whole.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::response::sse::Event;

use super::error::{Failure, Fallible};
use super::generate::ended;
use super::parse::{self, Parser};
use crate::model::{Outcome, Progress, Running};

/// Writes an answer and its events.
pub(super) trait Write: Unpin {
    /// Reads the text.
    fn parser(&mut self) -> &mut Parser;
    /// Writes what the parser found.
    fn event(&mut self, event: parse::Event);
    /// Ends the answer.
    fn done(&mut self, outcome: Outcome);
    /// Ends with an error.
    fn fail(&mut self, failure: &Failure);
    /// The events that are ready.
    fn ready(&mut self) -> &mut VecDeque<Event>;
    /// Whether no more updates follow.
    fn is_done(&self) -> bool;

    /// Takes what is new.
    fn update(&mut self, update: Progress) {
        match update {
            Progress::Text { text, .. } => {
                let events = self.parser().push(&text);
                events.into_iter().for_each(|event| self.event(event));
            }
            Progress::Done(outcome) => {
                let events = self.parser().finish();
                events.into_iter().for_each(|event| self.event(event));
                self.done(*outcome);
            }
            Progress::Failed(failed) => self.fail(&failed.into()),
        }
    }
}

/// Writes all of an answer, or with `first_only` what comes first. A text that fails by then is an error, and no answer.
pub(super) async fn whole(writer: &mut impl Write, running: &mut Running, first_only: bool) -> Fallible<()> {
    loop {
        match running.next().await {
            Some(Progress::Failed(failed)) => return Err(failed.into()),
            Some(update) => writer.update(update),
            None => return Err(ended()),
        }
        if first_only || writer.is_done() {
            return Ok(());
        }
    }
}

/// An answer as server-sent events.
pub(super) struct Events<W> {
    pub writer: W,
    pub running: Running,
}

impl<W: Write> futures_core::Stream for Events<W> {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(event) = self.writer.ready().pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if self.writer.is_done() {
                return Poll::Ready(None);
            }
            match self.running.poll_next(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(update)) => self.writer.update(update),
                Poll::Ready(None) => self.writer.fail(&ended()),
            }
        }
    }
}
