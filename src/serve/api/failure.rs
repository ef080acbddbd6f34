//! Errors as OpenAI's clients know them: a status and `{"error": {..}}`.

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use axum::http::{Response, StatusCode};
use axum::response::IntoResponse;
use serde_json::{Value, json};

use crate::error::Error;
use crate::serve::Refused;

/// Why a request is not answered.
#[derive(Debug)]
pub(super) struct Failure {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    header: Option<Box<(HeaderName, HeaderValue)>>,
}

/// What a handler gives.
pub(super) type Answer<T> = Result<T, Failure>;

impl Failure {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into(), param: None, code: None, header: None }
    }

    /// A request that makes no sense.
    pub(super) fn invalid(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::BAD_REQUEST, message)
    }

    /// The same, about a field.
    pub(super) fn field(param: impl Into<String>, message: impl Into<String>) -> Failure {
        Failure::invalid(message).about(param)
    }

    /// Names the field.
    pub(super) fn about(mut self, param: impl Into<String>) -> Failure {
        self.param = Some(param.into());
        self
    }

    /// Names the kind for programs.
    pub(super) fn code(mut self, code: &'static str) -> Failure {
        self.code = Some(code);
        self
    }

    /// Adds a header.
    pub(super) fn header(mut self, name: HeaderName, value: HeaderValue) -> Failure {
        self.header = Some(Box::new((name, value)));
        self
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The body.
    pub(super) fn json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Usage(message) => Failure::invalid(message),
            e => Failure::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
        }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Failure {
        match refused {
            Refused::Full { retry_after } => Failure::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!("as many requests wait as may; try again in {retry_after} s"),
            )
            .code("queue_full")
            .header(RETRY_AFTER, retry_after.into()),
            Refused::Stopping => stopping(),
        }
    }
}

/// What is said once the server is about to end.
pub(super) fn stopping() -> Failure {
    Failure::new(StatusCode::SERVICE_UNAVAILABLE, "the server is about to end").code("stopping")
}

/// What is said if the model's thread is gone.
pub(super) fn lost() -> Failure {
    Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "the model's thread gave no answer")
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response<Body> {
        let mut response = answer(self.status, &self.json());
        if let Some(header) = self.header {
            let (name, value) = *header;
            response.headers_mut().insert(name, value);
        }
        response
    }
}

/// A JSON body.
pub(super) fn answer(status: StatusCode, value: &impl serde::Serialize) -> Response<Body> {
    let (status, body) = match serde_json::to_vec(value) {
        Ok(body) => (status, body),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, Vec::new()),
    };
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
