//! A plain client, one connection for each request.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// What was answered.
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Response {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// A header, by its name in small letters.
    pub fn header(&self, name: &str) -> Option<&str> {
        let line = self.head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
        line.map(str::trim)
    }

    /// The message of an error, after a look at its shape.
    pub fn error(&self) -> String {
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("{json}"));
        let names: Vec<_> = error.keys().collect();
        assert_eq!(names, ["message", "type", "param", "code"]);
        let message = error["message"].as_str().unwrap();
        assert!(!message.contains('\n') && !message.is_empty(), "{message}");
        message.into()
    }
}

/// Sends bytes and reads until the server closes.
pub fn raw(address: SocketAddr, bytes: &[u8]) -> Response {
    let mut stream = connect(address);
    stream.write_all(bytes).unwrap();
    read(stream)
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

fn read(mut stream: TcpStream) -> Response {
    let mut bytes = Vec::new();
    // A server that refuses a body closes before it has read all of it.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let is_chunked = head.contains("transfer-encoding: chunked");
    let body = if is_chunked { unchunked(body) } else { body.to_string() };
    Response { status, head: head.to_string(), body }
}

fn unchunked(mut rest: &str) -> String {
    let mut body = String::new();
    loop {
        let (size, after) = rest.split_once("\r\n").unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return body;
        }
        body += &after[..size];
        rest = &after[size + 2..];
    }
}

/// A request as bytes.
pub fn request(
    address: SocketAddr,
    (method, path): (&str, &str),
    headers: &[(&str, &str)],
    body: &[u8],
) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    if !headers.iter().any(|(name, _)| *name == "Host") {
        text += &format!("Host: {address}\r\n");
    }
    headers.iter().for_each(|(name, value)| text += &format!("{name}: {value}\r\n"));
    text += &format!("Content-Length: {}\r\n\r\n", body.len());
    [text.as_bytes(), body].concat()
}

const JSON: (&str, &str) = ("Content-Type", "application/json");

pub fn get(address: SocketAddr, path: &str) -> Response {
    raw(address, &request(address, ("GET", path), &[], b""))
}

pub fn post(address: SocketAddr, path: &str, body: &Value) -> Response {
    post_bytes(address, path, body.to_string().as_bytes())
}

pub fn post_bytes(address: SocketAddr, path: &str, body: &[u8]) -> Response {
    raw(address, &request(address, ("POST", path), &[JSON], body))
}

/// A stream of events.
pub struct Events(BufReader<TcpStream>);

impl Events {
    /// Asks for it.
    pub fn open(address: SocketAddr, path: &str, body: &Value) -> Events {
        let mut body = body.clone();
        body["stream"] = true.into();
        let body = body.to_string();
        let mut stream = connect(address);
        stream.write_all(&request(address, ("POST", path), &[JSON], body.as_bytes())).unwrap();
        Events(BufReader::new(stream))
    }
}

impl Iterator for Events {
    type Item = String;

    /// The data of the next event; an event is never split over chunks.
    fn next(&mut self) -> Option<String> {
        let mut line = String::new();
        while self.0.read_line(&mut line).unwrap() > 0 {
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(data.trim_end().to_string());
            }
            line.clear();
        }
        None
    }
}

/// The chunks of a stream, which must end as OpenAI's do.
pub fn chunks(address: SocketAddr, path: &str, body: &Value) -> Vec<Value> {
    let mut all: Vec<String> = Events::open(address, path, body).collect();
    assert_eq!(all.pop().unwrap(), "[DONE]");
    all.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
}
