//! What every request passes: who may ask, and what every answer says to browsers.
//!
//! Pages of strangers that run in a browser on this machine can reach a server on it. They are kept out by
//! the names that a request must use for the server (against DNS rebinding), by its origin, and by a type
//! of body that a page may not send elsewhere without asking (there is no answer to that question).

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::{
    AUTHORIZATION, CONTENT_LENGTH, HOST, HeaderName, HeaderValue, ORIGIN, REFERRER_POLICY,
    WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Response, StatusCode, Version};
use axum::middleware::Next;
use axum::response::IntoResponse;
use http_body_util::BodyExt;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::Notify;

use super::App;
use super::failure::{Answer, Failure, stopping};
use super::server::Phase;
use crate::error::excerpt;

/// What needs no key: the page, and whether the server is there.
const PUBLIC: [&str; 2] = ["/", "/health"];
/// Time that an answer has when the server ends, before another one is given.
const END_TIME: Duration = Duration::from_millis(250);

/// Who may ask.
pub(super) struct Guard {
    /// Whether only this machine can reach the server.
    pub(super) is_local: bool,
    /// SHA-256 of the key.
    key: Option<[u8; 32]>,
}

/// Counts what is going on.
#[derive(Clone, Default)]
pub(super) struct Count(Arc<(AtomicUsize, Notify)>);

/// One of what is counted.
pub(super) struct Counted(Count);

impl Count {
    pub(super) fn begin(&self) -> Counted {
        self.0.0.fetch_add(1, Ordering::SeqCst);
        Counted(self.clone())
    }

    /// Waits until nothing is going on.
    pub(super) async fn none(&self) {
        loop {
            let notified = self.0.1.notified();
            if self.0.0.load(Ordering::SeqCst) == 0 {
                return;
            }
            notified.await;
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if self.0.0.0.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.0.1.notify_waiters();
        }
    }
}

impl Guard {
    pub(super) fn new(is_local: bool, key: Option<&str>) -> Guard {
        Guard { is_local, key: key.map(|key| Sha256::digest(key).into()) }
    }

    fn check(&self, request: &Request) -> Answer<()> {
        let headers = request.headers();
        let host = host(request)?;
        if self.is_local
            && let Some(host) = host.as_ref().filter(|host| !is_loopback(host.host()))
        {
            let text =
                format!("host = \"{}\"; this server is only for localhost", excerpt(host.host()));
            return Err(Failure::new(StatusCode::FORBIDDEN, text));
        }
        check_origin(headers, host.as_ref())?;
        if PUBLIC.contains(&request.uri().path()) { Ok(()) } else { self.check_key(headers) }
    }

    fn check_key(&self, headers: &HeaderMap) -> Answer<()> {
        let Some(key) = &self.key else { return Ok(()) };
        let given = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = given.and_then(|text| {
            let (scheme, key) = text.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
        });
        // Of equal lengths, and compared to the end.
        let found: [u8; 32] = Sha256::digest(given.unwrap_or_default()).into();
        if given.is_some() && bool::from(found.ct_eq(key)) {
            return Ok(());
        }
        let text = match given {
            Some(_) => "the API key is wrong",
            None => "an API key is needed, as \"Authorization: Bearer KEY\"",
        };
        Err(Failure::new(StatusCode::UNAUTHORIZED, text)
            .code("invalid_api_key")
            .header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")))
    }
}

/// What the request calls the server.
fn host(request: &Request) -> Answer<Option<Authority>> {
    let invalid = |what: &str| Failure::invalid(format!("host: {what}"));
    let mut all = request.headers().get_all(HOST).iter();
    let host = match (all.next(), all.next()) {
        (None, _) if request.version() < Version::HTTP_11 => None,
        (None, _) => return Err(invalid("the header is missing")),
        (Some(host), None) => match Authority::try_from(host.as_bytes()) {
            Ok(host) => Some(host),
            Err(_) => return Err(invalid("the header is not a name or address")),
        },
        (Some(_), Some(_)) => return Err(invalid("the header is there twice")),
    };
    // A target with a host of its own goes before the header.
    Ok(request.uri().authority().cloned().or(host))
}

fn is_loopback(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    let is_loopback = |address: IpAddr| address.is_loopback();
    host.eq_ignore_ascii_case("localhost") || address.parse().is_ok_and(is_loopback)
}

/// Refuses what a page of another server asks.
fn check_origin(headers: &HeaderMap, host: Option<&Authority>) -> Answer<()> {
    let Some(origin) = headers.get(ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().unwrap_or_default();
    let own = host.is_some_and(|host| {
        let (_, at) = origin.split_once("://").unwrap_or_default();
        at.eq_ignore_ascii_case(host.as_str())
    });
    if own {
        return Ok(());
    }
    let text = format!("origin = \"{}\"; pages of other servers may not ask", excerpt(origin));
    Err(Failure::new(StatusCode::FORBIDDEN, text))
}

/// Lets a request pass, or not.
pub(super) async fn pass(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response<Body> {
    let counted = app.requests.begin();
    let response = match app.guard.check(&request) {
        Ok(()) => {
            let mut phase = app.phase.clone();
            tokio::select! {
                response = next.run(request) => response,
                () = end(&mut phase) => stopping().into_response(),
            }
        }
        Err(failure) => failure.into_response(),
    };
    app.metrics.answered(response.status());
    let (mut head, body) = response.into_parts();
    let mut set =
        |name: HeaderName, value| head.headers.insert(name, HeaderValue::from_static(value));
    set(X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(REFERRER_POLICY, "no-referrer");
    if let Some(n) = body.size_hint().exact() {
        // Once the body is wrapped, its length is not known any more.
        head.headers.entry(CONTENT_LENGTH).or_insert(n.into());
    }
    // It is over when its last byte is handed on.
    let body = body.map_frame(move |frame| {
        let _ = &counted;
        frame
    });
    Response::from_parts(head, Body::new(body))
}

/// Waits until the server ends, and a moment longer.
async fn end(phase: &mut tokio::sync::watch::Receiver<Phase>) {
    // Without a server there is nothing to wait for.
    let _ = phase.wait_for(|phase| *phase == Phase::Over).await.is_ok();
    tokio::time::sleep(END_TIME).await;
}
