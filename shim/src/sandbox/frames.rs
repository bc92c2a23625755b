//! What of the agent's bytes reaches the ttrpc client: answers, each of a bearable length.
//!
//! The client would keep what comes on the stream of a call until the caller takes it, and a stream
//! on which data came without an end for ever; a long frame it would hold as a whole. An agent
//! answers each call with one frame, so that anything else breaks the connection off.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use protocol::ANSWER_MAX;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use ttrpc::{
    MessageHeader,
    proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_RESPONSE},
};

/// The connection to the agent, of which only answers are read.
#[derive(Debug)]
pub(super) struct Answers {
    stream: UnixStream,
    at: Place,
}

/// Where in the agent's bytes the next one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a frame's header, of which so many bytes are known.
    Header([u8; MESSAGE_HEADER_LENGTH], usize),
    /// In what it announces, of which so many bytes are missing.
    Body(usize),
}

impl Answers {
    /// Those that come on `stream`.
    pub(super) fn on(stream: UnixStream) -> Self {
        Self {
            stream,
            at: Place::START,
        }
    }
}

impl Place {
    const START: Self = Self::Header([0; MESSAGE_HEADER_LENGTH], 0);

    /// The place behind `bytes`.
    fn behind(mut self, mut bytes: &[u8]) -> io::Result<Self> {
        loop {
            match &mut self {
                Self::Body(0) => self = Self::START,
                Self::Body(missing) => {
                    let count = bytes.len().min(*missing);
                    *missing -= count;
                    bytes = &bytes[count..];
                }
                Self::Header(header, MESSAGE_HEADER_LENGTH) => {
                    self = Self::Body(announced(MessageHeader::from(*header))?);
                }
                Self::Header(header, known) => {
                    let count = bytes.len().min(MESSAGE_HEADER_LENGTH - *known);
                    header[*known..*known + count].copy_from_slice(&bytes[..count]);
                    *known += count;
                    bytes = &bytes[count..];
                }
            }
            let complete = matches!(self, Self::Header(_, MESSAGE_HEADER_LENGTH));
            if bytes.is_empty() && !complete {
                return Ok(self);
            }
        }
    }
}

/// The length of what follows a header, if it is an answer's.
fn announced(header: MessageHeader) -> io::Result<usize> {
    let refused = |text: String| Err(io::Error::new(io::ErrorKind::InvalidData, text));
    if header.type_ != MESSAGE_TYPE_RESPONSE {
        return refused("the agent sent something else than an answer".to_owned());
    }
    match header.length as usize {
        length if length <= ANSWER_MAX => Ok(length),
        length => refused(format!(
            "an answer of the agent has {length} bytes, more than {ANSWER_MAX}"
        )),
    }
}

impl AsyncRead for Answers {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.at = self.at.behind(&buffer.filled()[before..])?;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Answers {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ttrpc::proto::MESSAGE_TYPE_DATA;

    use super::*;

    fn frame(kind: u8, length: usize) -> Vec<u8> {
        let header = MessageHeader {
            length: length as u32,
            stream_id: 1,
            type_: kind,
            flags: 0,
        };
        Vec::from(header)
    }

    fn answer(length: usize) -> Vec<u8> {
        let mut bytes = frame(MESSAGE_TYPE_RESPONSE, length);
        bytes.resize(MESSAGE_HEADER_LENGTH + length, 7);
        bytes
    }

    #[test]
    fn data_on_a_stream_is_no_answer() {
        let error = Place::START.behind(&frame(MESSAGE_TYPE_DATA, 0));
        assert!(error.is_err(), "{error:?}");
    }

    #[test]
    fn an_answer_that_is_too_long_is_refused_at_its_header() {
        let kind = MESSAGE_TYPE_RESPONSE;
        assert!(Place::START.behind(&frame(kind, ANSWER_MAX)).is_ok());
        let error = Place::START.behind(&frame(kind, ANSWER_MAX + 1));
        let error = error.expect_err("refused").to_string();
        assert!(error.contains("1048577 bytes"), "{error}");
    }

    proptest! {
        #[test]
        fn answers_are_known_however_they_are_cut(
            lengths in proptest::collection::vec(0_usize..40, 0..6),
            piece in 1_usize..30,
        ) {
            let bytes: Vec<u8> = lengths.into_iter().flat_map(answer).collect();
            let at = bytes.chunks(piece).try_fold(Place::START, Place::behind).expect("answers");
            prop_assert!(matches!(at, Place::Body(0) | Place::Header(_, 0)), "{at:?}");
        }

        #[test]
        fn other_bytes_are_an_error_and_no_panic(bytes: Vec<u8>) {
            let _ = Place::START.behind(&bytes);
        }
    }
}
