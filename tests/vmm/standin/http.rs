//! HTTP as the real program's server speaks it, which is less than all of it.
//!
//! A body needs its length told; one in chunks is none. A request line and each header fit
//! in 1024 bytes. Of the methods it knows GET, PUT and PATCH.

/// What a request line or a header may have.
const LINE_MAX_BYTES: usize = 1024;

/// A request that has come in whole.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    /// None if it is empty.
    pub(crate) body: Option<Vec<u8>>,
}

/// What the next bytes are.
#[derive(Debug)]
pub(crate) enum Parsed {
    /// More must come.
    Part {
        /// Whether the other end waits to be told to go on.
        expects: bool,
    },
    Whole(Request),
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) body: Option<String>,
}

impl Response {
    /// Returns the bytes to send.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let server = "Server: Cloud Hypervisor API\r\nConnection: keep-alive\r\n";
        let mut text = format!("HTTP/1.1 {} \r\n{server}", self.status);
        let body = self.body.as_deref().unwrap_or_default();
        if self.status != 204 {
            let length = body.len();
            text += &format!("Content-Type: application/json\r\nContent-Length: {length}\r\n");
        }
        format!("{text}\r\n{body}").into_bytes()
    }

    /// The answer to what cannot be parsed.
    pub(crate) fn unparsed(said: &str) -> Self {
        let rest = "All previous unanswered requests will be dropped.";
        Self { status: 400, body: Some(format!("{{ \"error\": \"{said}\n{rest}\" }}")) }
    }
}

/// Takes a request from the front of `buffer`, if it is there as a whole.
pub(crate) fn parse(buffer: &mut Vec<u8>, body_max_bytes: usize) -> Result<Parsed, String> {
    let Some(head) = find(buffer, b"\r\n\r\n") else {
        let last = buffer.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
        if last.len() >= LINE_MAX_BYTES {
            return Err("Invalid HTTP Request".to_owned());
        }
        return Ok(Parsed::Part { expects: false });
    };
    let text = std::str::from_utf8(&buffer[..head]).map_err(|error| error.to_string())?;
    let mut lines = text.split("\r\n");
    let (method, path) = request_line(lines.next().unwrap_or_default())?;
    let (length, expects) = headers(lines)?;
    if length > body_max_bytes {
        return Err(format!(
            "Payload size exceeds limit: limit is {body_max_bytes} bytes, request is {length} bytes"
        ));
    }
    let body = head + 4;
    if buffer.len() < body + length {
        return Ok(Parsed::Part { expects });
    }
    let request = Request {
        method: method.to_owned(),
        path: path.to_owned(),
        body: (length > 0).then(|| buffer[body..body + length].to_vec()),
    };
    buffer.drain(..body + length);
    Ok(Parsed::Whole(request))
}

fn request_line(line: &str) -> Result<(&str, &str), String> {
    if line.len() > LINE_MAX_BYTES {
        return Err("Invalid HTTP Request".to_owned());
    }
    let mut words = line.splitn(3, ' ');
    let (Some(method), Some(uri), Some(version)) = (words.next(), words.next(), words.next())
    else {
        return Err("Invalid HTTP Request".to_owned());
    };
    if !["GET", "PUT", "PATCH"].contains(&method) {
        return Err("Invalid HTTP Method: Unsupported HTTP method.".to_owned());
    }
    if !["HTTP/1.0", "HTTP/1.1"].contains(&version) {
        return Err("Invalid HTTP Version: Unsupported HTTP version.".to_owned());
    }
    let path = match uri.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("", |at| &rest[at..]),
        None => uri,
    };
    Ok((method, path))
}

/// Returns the length of the body, and whether the other end waits to send it.
fn headers<'a>(lines: impl Iterator<Item = &'a str>) -> Result<(usize, bool), String> {
    let (mut length, mut expects) = (0, false);
    for line in lines {
        let entry = line.split_once(':').filter(|_| line.len() <= LINE_MAX_BYTES);
        let (name, value) = entry.ok_or_else(|| format!("Invalid header: {line}"))?;
        match name.trim().to_ascii_lowercase().as_str() {
            "content-length" => {
                let number: u32 = value
                    .trim()
                    .parse()
                    .map_err(|_| format!("Invalid value. Key: {name}; Value: {value}"))?;
                length = usize::try_from(number).map_err(|error| error.to_string())?;
            }
            "expect" => expects = value.trim() == "100-continue",
            _ => {}
        }
    }
    Ok((length, expects))
}

fn find(bytes: &[u8], sequence: &[u8]) -> Option<usize> {
    bytes.windows(sequence.len()).position(|window| window == sequence)
}
