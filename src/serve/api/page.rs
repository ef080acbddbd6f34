//! `GET /`: the page, one file that fetches nothing from elsewhere.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::Response;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, X_FRAME_OPTIONS,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use super::App;
use crate::error::{Error, Result};

static HTML: &str = include_str!("../page/dist/index.html");

/// What goes with the page.
pub(super) struct Page {
    policy: HeaderValue,
}

impl Page {
    /// Nothing may run or be styled but the scripts and styles in the page itself.
    pub(super) fn new() -> Result<Page> {
        let [scripts, styles] = ["script", "style"].map(|tag| {
            let blocks = blocks(HTML).into_iter().filter(|(of, _)| *of == tag);
            let hashes: Vec<String> = blocks
                .map(|(_, text)| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text))))
                .collect();
            if hashes.is_empty() { "'none'".into() } else { hashes.join(" ") }
        });
        let policy = format!(
            "default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; \
             img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        let policy = HeaderValue::try_from(policy);
        let policy = policy.map_err(|e| Error::Runtime(format!("the page: {e}")))?;
        Ok(Page { policy })
    }
}

/// The scripts and styles of a page: tag and text.
fn blocks(html: &str) -> Vec<(&'static str, &str)> {
    let mut found = Vec::new();
    let mut rest = html;
    loop {
        let next = ["script", "style"].into_iter().filter_map(|tag| {
            let open = rest.find(&format!("<{tag}"))?;
            let start = open + rest[open..].find('>')? + 1;
            let end = start + rest[start..].find(&format!("</{tag}>"))?;
            Some((start, end, tag))
        });
        let Some((start, end, tag)) = next.min() else { return found };
        found.push((tag, &rest[start..end]));
        rest = &rest[end..];
    }
}

/// The page.
pub(super) async fn page(State(app): State<Arc<App>>) -> Response<Body> {
    let mut response = Response::new(Body::from(HTML));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(CONTENT_SECURITY_POLICY, app.page.policy.clone());
    response
}

#[cfg(test)]
mod tests {
    use super::blocks;

    #[test]
    fn scripts_and_styles_are_found() {
        let html = "<style>a</style><script defer>'<style>'</script><style>b</style><p>";
        assert_eq!(blocks(html), [("style", "a"), ("script", "'<style>'"), ("style", "b")]);
    }
}
