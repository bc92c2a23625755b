//! How a program of the host asks for a connection to the guest: it writes
//! `CONNECT <port>\n` and is answered with `OK <host port>\n` once the guest
//! has accepted. From then on the socket carries the connection's bytes.

/// The longest line, its end counted.
pub const MAX_LINE_BYTES: usize = 32;

/// Why a line is not a greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It does not read `CONNECT <port>`.
    #[error("not of the form `CONNECT <port>`")]
    Form,
    /// It has no end within [`MAX_LINE_BYTES`].
    #[error("longer than {MAX_LINE_BYTES} bytes")]
    TooLong,
}

/// Reads the port out of a line without its end.
///
/// ```
/// use vmm::virtio::vsock::greeting::parse;
/// assert_eq!(parse(b"CONNECT 1024"), Ok(1024));
/// assert!(parse(b"CONNECT +1").is_err());
/// ```
///
/// # Errors
/// When the line is not a greeting.
pub fn parse(line: &[u8]) -> Result<u32, Error> {
    let digits = line.strip_prefix(b"CONNECT ").ok_or(Error::Form)?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(Error::Form);
    }
    let port: u32 = std::str::from_utf8(digits)
        .ok()
        .and_then(|digits| digits.parse().ok())
        .ok_or(Error::Form)?;
    // VMADDR_PORT_ANY names no port.
    if port == u32::MAX {
        return Err(Error::Form);
    }
    Ok(port)
}

/// A line that comes in pieces.
#[derive(Debug, Default)]
pub struct Line {
    bytes: [u8; MAX_LINE_BYTES],
    len: usize,
}

impl Line {
    /// How many more bytes the line may have; never 0 before an error.
    pub fn room(&self) -> usize {
        MAX_LINE_BYTES - self.len
    }

    /// Looks at the bytes that come next. Says how many of them belong to the line, and its
    /// port once it is whole.
    ///
    /// # Errors
    /// When the line is too long or not a greeting.
    pub fn take(&mut self, next: &[u8]) -> Result<(usize, Option<u32>), Error> {
        let next = &next[..next.len().min(self.room())];
        let end = next.iter().position(|&byte| byte == b'\n');
        let part = &next[..end.unwrap_or(next.len())];
        self.bytes[self.len..self.len + part.len()].copy_from_slice(part);
        self.len += part.len();
        match end {
            Some(end) => Ok((end + 1, Some(parse(&self.bytes[..self.len])?))),
            None if self.room() == 0 => Err(Error::TooLong),
            None => Ok((part.len(), None)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_follows_the_line_does_not_belong_to_it() {
        let mut line = Line::default();
        assert_eq!(line.take(b"CONNECT 52\nhello"), Ok((11, Some(52))));
    }

    #[test]
    fn a_line_may_come_in_pieces() {
        let mut line = Line::default();
        assert_eq!(line.take(b"CONN"), Ok((4, None)));
        assert_eq!(line.take(b"ECT 7"), Ok((5, None)));
        assert_eq!(line.take(b"\n"), Ok((1, Some(7))));
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut line = Line::default();
        assert_eq!(line.take(&[b'a'; 40]), Err(Error::TooLong));
    }

    #[test]
    fn other_lines_are_refused() {
        for line in [
            "",
            "CONNECT",
            "CONNECT ",
            "connect 1",
            "CONNECT 1 ",
            "CONNECT -1",
            "CONNECT 1\r",
            "CONNECT 4294967295",
            "CONNECT 4294967296",
            "CONNECT  1",
            "PING",
        ] {
            assert_eq!(parse(line.as_bytes()), Err(Error::Form), "{line}");
        }
    }

    proptest! {
        #[test]
        fn every_port_is_read_back(port in 0..u32::MAX, cut in 0..20_usize) {
            let text = format!("CONNECT {port}\n");
            let (first, second) = text.as_bytes().split_at(cut.min(text.len() - 1));
            let mut line = Line::default();
            prop_assert_eq!(line.take(first), Ok((first.len(), None)));
            prop_assert_eq!(line.take(second), Ok((second.len(), Some(port))));
        }

        #[test]
        fn no_bytes_confuse_the_line(pieces in proptest::collection::vec(
            proptest::collection::vec(any::<u8>(), 0..50), 0..8))
        {
            let mut line = Line::default();
            for piece in pieces {
                match line.take(&piece) {
                    Ok((taken, None)) => prop_assert!(taken <= piece.len() && line.room() > 0),
                    _ => break,
                }
            }
        }
    }
}
