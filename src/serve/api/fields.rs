//! JSON of requests, taken apart field by field, so that an error names the field, and what nobody
//! asked for is noticed.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use axum::http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::failure::{Answer, Failure};
use crate::error::excerpt;

/// Time that a body may take to arrive.
const MAX_TIME: Duration = Duration::from_secs(30);
/// Bytes behind the limit that are read to be thrown away.
const MAX_DISCARDED: usize = 64 << 20;

/// The fields of an object that have not been looked at.
pub(super) struct Fields {
    /// The object's own name and a dot, if it has one.
    path: String,
    map: Map<String, Value>,
}

/// Reads the body of a request, at most `limit` bytes.
pub(super) async fn read(request: Request, limit: usize) -> Answer<Fields> {
    let (head, body) = request.into_parts();
    check_headers(&head.headers, limit)?;
    let bytes = match tokio::time::timeout(MAX_TIME, collect(body, limit)).await {
        Ok(bytes) => bytes?,
        Err(_) => {
            let text = format!("the body did not arrive within {} s", MAX_TIME.as_secs());
            return Err(Failure::new(StatusCode::REQUEST_TIMEOUT, text));
        }
    };
    Fields::parse(&bytes)
}

fn check_headers(headers: &HeaderMap, limit: usize) -> Answer<()> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let unsupported = |text: String| Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text);
    let kind = text(CONTENT_TYPE).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        let found = excerpt(kind);
        return Err(unsupported(format!("content-type = \"{found}\"; application/json is needed")));
    }
    if let Some(encoding) = text(CONTENT_ENCODING).filter(|e| !e.eq_ignore_ascii_case("identity")) {
        let found = excerpt(encoding);
        return Err(unsupported(format!("content-encoding = \"{found}\"; none is supported")));
    }
    let n = text(CONTENT_LENGTH).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    let waits = headers.contains_key(EXPECT);
    if n > limit as u64 && (waits || n > (limit + MAX_DISCARDED) as u64) {
        return Err(too_large(limit));
    }
    Ok(())
}

/// The bytes of a body. One that is too large is read all the same, up to a point: many clients only look
/// for an answer when they have sent everything.
async fn collect(mut body: Body, limit: usize) -> Answer<Vec<u8>> {
    let (mut bytes, mut n) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Failure::invalid("the body broke off"))?;
        let data = frame.data_ref().map_or(&[][..], |data| &data[..]);
        n += data.len();
        match n <= limit {
            true => bytes.extend_from_slice(data),
            false => bytes = Vec::new(),
        }
        if n > limit + MAX_DISCARDED {
            break;
        }
    }
    if n > limit { Err(too_large(limit)) } else { Ok(bytes) }
}

fn too_large(limit: usize) -> Failure {
    Failure::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("the body is larger than {limit} bytes, which are allowed"),
    )
}

impl Fields {
    /// Reads an object.
    pub(super) fn parse(bytes: &[u8]) -> Answer<Fields> {
        if bytes.is_empty() {
            return Err(Failure::invalid("the body is empty; a JSON object is needed"));
        }
        if let Err(e) = std::str::from_utf8(bytes) {
            let at = e.valid_up_to();
            return Err(Failure::invalid(format!("the body is not UTF-8 at byte {at}")));
        }
        match serde_json::from_slice(bytes) {
            Ok(Strict(Value::Object(map))) => Ok(Fields { path: String::new(), map }),
            Ok(Strict(other)) => {
                let text = format!("the body is {}; a JSON object is needed", kind(&other));
                Err(Failure::invalid(text))
            }
            Err(e) => Err(Failure::invalid(format!("the body is not JSON: {e}"))),
        }
    }

    /// The fields of a value that must be an object; `name` is its own.
    pub(super) fn of(name: &str, value: Value) -> Answer<Fields> {
        match value {
            Value::Object(map) => Ok(Fields { path: format!("{name}."), map }),
            other => Err(wrong(name, &other, "an object")),
        }
    }

    /// A field's whole name.
    pub(super) fn name(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// A field; null is as good as none.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// A text.
    pub(super) fn text(&mut self, name: &str) -> Answer<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.name(name), &other, "a string")),
        }
    }

    /// A text that must be there.
    pub(super) fn needed_text(&mut self, name: &str) -> Answer<String> {
        self.text(name)?.ok_or_else(|| self.missing(name))
    }

    /// Says that a field is not there.
    pub(super) fn missing(&self, name: &str) -> Failure {
        let name = self.name(name);
        Failure::field(&name, format!("{name} is missing"))
    }

    /// Whether something is to be.
    pub(super) fn flag(&mut self, name: &str) -> Answer<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong(&self.name(name), &other, "true or false")),
        }
    }

    /// A number.
    pub(super) fn number(&mut self, name: &str) -> Answer<Option<f64>> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => Err(wrong(&self.name(name), &value, "a number")),
            },
        }
    }

    /// A whole number.
    pub(super) fn whole(
        &mut self,
        name: &str,
        allowed: RangeInclusive<usize>,
    ) -> Answer<Option<usize>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        whole(&self.name(name), &value, allowed).map(Some)
    }

    /// An array.
    pub(super) fn list(&mut self, name: &str) -> Answer<Option<Vec<Value>>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(wrong(&self.name(name), &other, "an array")),
        }
    }

    /// An object.
    pub(super) fn object(&mut self, name: &str) -> Answer<Option<Fields>> {
        let path = self.name(name);
        self.take(name).map(|value| Fields::of(&path, value)).transpose()
    }

    /// What is left.
    pub(super) fn into_map(self) -> Map<String, Value> {
        self.map
    }

    /// Refuses fields that nobody has looked at, but for those in `ignored`, which change nothing.
    pub(super) fn end(self, ignored: &[&str]) -> Answer<()> {
        match self.map.keys().find(|name| !ignored.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                let name = self.name(&excerpt(name));
                Err(Failure::field(&name, format!("{name}: unknown field")).code("unknown_field"))
            }
        }
    }
}

/// A whole number in a range.
pub(super) fn whole(name: &str, value: &Value, allowed: RangeInclusive<usize>) -> Answer<usize> {
    if !value.is_number() {
        return Err(wrong(name, value, "a whole number"));
    }
    match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
        Some(n) if allowed.contains(&n) => Ok(n),
        _ => {
            let (start, end) = (allowed.start(), allowed.end());
            let allowed = match *end {
                usize::MAX => format!("whole numbers, {start} or more"),
                end => format!("whole numbers, {start} to {end}"),
            };
            Err(Failure::field(name, format!("{name} = {value}; allowed {allowed}")))
        }
    }
}

/// Tokens of the vocabulary.
pub(super) fn tokens(name: &str, list: &[Value], n_vocab: usize) -> Answer<Vec<u32>> {
    let one = |(i, value)| whole(&format!("{name}[{i}]"), value, 0..=n_vocab - 1);
    list.iter().enumerate().map(|pair| one(pair).map(|id| id as u32)).collect()
}

/// Says that a field has a value of a wrong kind.
pub(super) fn wrong(name: &str, found: &Value, needed: &str) -> Failure {
    Failure::field(name, format!("{name} is {}; {needed} is needed", kind(found)))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// JSON in which no object has two fields of one name: which of them was meant is not known.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Strict, D::Error> {
        from.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, x: bool) -> Result<Value, E> {
        Ok(x.into())
    }

    fn visit_i64<E>(self, x: i64) -> Result<Value, E> {
        Ok(x.into())
    }

    fn visit_u64<E>(self, x: u64) -> Result<Value, E> {
        Ok(x.into())
    }

    fn visit_f64<E>(self, x: f64) -> Result<Value, E> {
        Ok(x.into())
    }

    fn visit_str<E>(self, x: &str) -> Result<Value, E> {
        Ok(x.into())
    }

    fn visit_string<E>(self, x: String) -> Result<Value, E> {
        Ok(x.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(value)) = from.next_element()? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(name) = from.next_key::<String>()? {
            if map.contains_key(&name) {
                let name = excerpt(&name);
                return Err(A::Error::custom(format!("\"{name}\" is there twice")));
            }
            let Strict(value) = from.next_value()?;
            map.insert(name, value);
        }
        Ok(Value::Object(map))
    }
}
