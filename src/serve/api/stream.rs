//! Streams of server-sent events (HTML standard, section 9.2).

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::Response;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use serde::Serialize;

use super::failure::Answer;
use super::reply::Total;
use super::texts::{News, Texts};

/// Time without an event after which a comment says that the server is still there.
const ALIVE_TIME: Duration = Duration::from_secs(15);
/// Bytes of events that are written together at most, unless one is longer.
const MAX_WRITE: usize = 16 << 10;
/// A comment.
const ALIVE: &[u8] = b": still here\n\n";
/// What OpenAI's clients end at.
const DONE: &[u8] = b"data: [DONE]\n\n";

/// What an endpoint makes of what happens to texts.
pub(super) trait Shape: Send + 'static {
    /// Writes the events for it.
    fn news(&mut self, index: usize, news: News, out: &mut Vec<u8>);

    /// Writes what comes behind all texts.
    fn last(&mut self, total: &Total, out: &mut Vec<u8>);
}

struct Flow<S> {
    texts: Texts,
    shape: S,
    total: Total,
    is_over: bool,
}

/// Appends an event.
pub(super) fn event(value: &impl Serialize, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    let start = out.len();
    if serde_json::to_writer(&mut *out, value).is_err() {
        // Numbers and texts are always JSON.
        out.truncate(start);
    }
    out.extend_from_slice(b"\n\n");
}

/// The answer that streams texts. Who asks and goes away drops it, and with it the texts.
pub(super) fn response<S: Shape>(texts: Texts, shape: S, total: Total) -> Response<Body> {
    let flow = Flow { texts, shape, total, is_over: false };
    let events = futures_util::stream::unfold(flow, |mut flow| async move {
        let bytes = flow.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(bytes)), flow))
    });
    let mut response = Response::new(Body::from_stream(events));
    let mut set =
        |name, value| response.headers_mut().insert(name, HeaderValue::from_static(value));
    set(CONTENT_TYPE, "text/event-stream");
    set(CACHE_CONTROL, "no-cache");
    // Some proxies keep what they are sent until there is more of it.
    set(HeaderName::from_static("x-accel-buffering"), "no");
    response
}

impl<S: Shape> Flow<S> {
    /// The next events, as many as there are; `None` after the last.
    async fn next(&mut self) -> Option<Vec<u8>> {
        if self.is_over {
            return None;
        }
        let mut out = Vec::new();
        while out.is_empty() {
            match tokio::time::timeout(ALIVE_TIME, self.texts.next()).await {
                Ok(news) => self.take(news, &mut out),
                Err(_) => out.extend_from_slice(ALIVE),
            }
        }
        while !self.is_over
            && out.len() < MAX_WRITE
            && let Some(news) = self.texts.ready()
        {
            self.take(news, &mut out);
        }
        Some(out)
    }

    fn take(&mut self, news: Option<Answer<(usize, News)>>, out: &mut Vec<u8>) {
        match news {
            Some(Ok((index, news))) => {
                if let News::Ended(.., cost) = &news {
                    self.total.add(index, cost);
                }
                self.shape.news(index, news, out);
            }
            Some(Err(failure)) => {
                self.is_over = true;
                event(&failure.json(), out);
            }
            None => {
                self.is_over = true;
                self.shape.last(&self.total, out);
                out.extend_from_slice(DONE);
            }
        }
    }
}
