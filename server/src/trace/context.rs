//! The headers of W3C Trace Context: <https://www.w3.org/TR/trace-context/>.

use std::str::FromStr;

use axum::http::HeaderMap;
use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

/// Characters of `tracestate` that are passed on; the specification asks for as many.
const MOST_STATE: usize = 512;

/// The client's span that a request is a part of. Headers that are malformed count as none.
pub(super) fn parent(headers: &HeaderMap) -> Option<SpanContext> {
    let mut all = headers.get_all("traceparent").iter();
    let (only, None) = (all.next()?, all.next()) else { return None };
    let (trace, span, flags) = traceparent(only.to_str().ok()?)?;
    Some(SpanContext::new(trace, span, flags, true, tracestate(headers)))
}

/// Reads `VERSION-TRACE-SPAN-FLAGS`. A version that is not known may have more after it.
fn traceparent(text: &str) -> Option<(TraceId, SpanId, TraceFlags)> {
    let (known, rest) = text.split_at_checked(55)?;
    let parts: Vec<&str> = known.split('-').collect();
    let [version, trace, span, flags] = parts[..] else { return None };
    let is_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let has_form = [(version, 2), (trace, 32), (span, 16), (flags, 2)]
        .into_iter()
        .all(|(part, length)| part.len() == length && is_hex(part));
    let ends = rest.is_empty() || version != "00" && rest.starts_with('-');
    if !has_form || !ends || version == "ff" {
        return None;
    }
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    // The other flags are not for those who do not know them.
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    (trace != TraceId::INVALID && span != SpanId::INVALID).then_some((trace, span, flags))
}

/// What other systems noted. The last entries go if there is too much.
fn tracestate(headers: &HeaderMap) -> TraceState {
    let all: Vec<&str> =
        headers.get_all("tracestate").iter().filter_map(|value| value.to_str().ok()).collect();
    let mut text = all.join(",");
    while text.len() > MOST_STATE {
        text.truncate(text.rfind(',').unwrap_or(0));
    }
    TraceState::from_str(&text).unwrap_or_default()
}

/// The header `traceresponse`: the server's span, in the same form.
pub(super) fn traceresponse(context: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags())
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderMap, HeaderName, HeaderValue};

    use super::{parent, traceparent, traceresponse};

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
        let header = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        all.iter().map(header).fold(HeaderMap::new(), |mut headers, (name, value)| {
            headers.append(name, value);
            headers
        })
    }

    #[test]
    fn parents_of_known_and_later_versions_are_read() {
        for (text, is_sampled) in [
            (format!("00-{TRACE}-{SPAN}-01"), true),
            (format!("00-{TRACE}-{SPAN}-00"), false),
            // Flags that are not known.
            (format!("00-{TRACE}-{SPAN}-ff"), true),
            (format!("00-{TRACE}-{SPAN}-02"), false),
            (format!("cc-{TRACE}-{SPAN}-01"), true),
            (format!("cc-{TRACE}-{SPAN}-01-what-the-future-has"), true),
            (format!("01-{TRACE}-{SPAN}-01-"), true),
        ] {
            let (trace, span, flags) = traceparent(&text).unwrap();
            assert_eq!((trace.to_string(), span.to_string()), (TRACE.into(), SPAN.into()), "{text}");
            assert_eq!(flags.is_sampled(), is_sampled, "{text}");
            assert!(flags.to_u8() <= 1, "{text}");
        }
    }

    #[test]
    fn what_is_malformed_is_no_parent() {
        for text in [
            String::new(),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-01-"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("cc-{TRACE}-{SPAN}-01.more"),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{TRACE}-{}-01", SPAN.to_uppercase()),
            format!("0X-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-0X"),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("00-{TRACE}-{SPAN}"),
            format!("0-{TRACE}-{SPAN}-01"),
            format!("000-{TRACE}-{SPAN}-01"),
            format!("+0-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}x-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", &TRACE[1..]),
            format!("00-{}.-{SPAN}-01", &TRACE[1..]),
            format!("00-{TRACE}-{}.-01", &SPAN[1..]),
            format!("00_{TRACE}_{SPAN}_01"),
            format!("00-{}é-{SPAN}-01", &TRACE[2..]),
        ] {
            assert_eq!(traceparent(&text), None, "{text}");
        }
        let valid = format!("00-{TRACE}-{SPAN}-01");
        let twice = headers(&[("traceparent", &valid), ("traceparent", &valid)]);
        assert_eq!(parent(&twice), None);
        // A state without a parent is nothing.
        assert_eq!(parent(&headers(&[("tracestate", "a=1")])), None);
    }

    #[test]
    fn state_is_passed_on_within_its_limit() {
        let valid = format!("00-{TRACE}-{SPAN}-01");
        let state = |states: &[&str]| {
            let all: Vec<_> = states.iter().map(|state| ("tracestate", *state)).collect();
            parent(&headers(&[&[("traceparent", valid.as_str())][..], &all[..]].concat())).unwrap()
        };
        assert_eq!(state(&["foo=1 , bar=2", "t@v=3"]).trace_state().header(), "foo=1,bar=2,t@v=3");
        assert_eq!(traceresponse(&state(&[])), valid);
        // What is malformed goes, and the parent stays.
        assert_eq!(state(&["foo=1,BAR=2"]).trace_state().header(), "");
        let long = format!("a={},b={},c={}", "x".repeat(200), "x".repeat(200), "x".repeat(200));
        assert_eq!(state(&[&long]).trace_state().header(), long[..405]);
        assert_eq!(state(&[&"x".repeat(600)]).trace_state().header(), "");
    }
}
