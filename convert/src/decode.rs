//! Uncompressing a layer as a stream: gzip (any number of members), zstd (any number of frames), plain tar.
//!
//! The first bytes decide, as they do in every engine: media types lie. Content that neither magic begins is plain.
//! Checksums of gzip are not looked at: the diff_id covers every byte.

use std::io::{self, Read};

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder as ZstdDecoder, InBuffer, Operation, OutBuffer};

use crate::gzip;

/// Largest zstd window accepted, as a power of two: 128 MiB, zstd's own default.
const WINDOW_LOG_MAX: u32 = 27;

/// Why a layer cannot be uncompressed.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("the gzip stream is corrupt")]
    Gzip,
    #[error("the zstd stream is corrupt: {0}")]
    Zstd(io::Error),
    #[error("the {0} stream ends too early")]
    Truncated(&'static str),
    #[error("bytes that are not gzip follow the gzip stream")]
    Trailing,
    #[error("cannot read the layer: {0}")]
    Read(#[from] io::Error),
}

enum Engine {
    /// Nothing read yet.
    Unknown,
    Plain,
    Gzip {
        inflate: Box<Decompress>,
        member: Member,
    },
    Zstd {
        decoder: ZstdDecoder<'static>,
        /// Within a frame.
        open: bool,
    },
}

enum Member {
    Header(gzip::Header),
    Stream,
    /// So many bytes are left of it.
    Trailer(usize),
    /// Between members: another one, zeros or the end may follow.
    Ended,
    /// Zeros were seen: nothing but zeros may follow.
    Padding,
}

/// Uncompresses what `input` gives.
pub struct Decoder<R> {
    input: R,
    buffer: Vec<u8>,
    at: usize,
    end: usize,
    /// The input has ended.
    eof: bool,
    engine: Engine,
    bytes_in: u64,
}

impl<R> std::fmt::Debug for Decoder<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder")
            .field("bytes_in", &self.bytes_in)
            .finish_non_exhaustive()
    }
}

impl<R: Read> Decoder<R> {
    /// A decoder that reads `buffer_size` bytes at a time.
    pub fn new(input: R, buffer_size: usize) -> Self {
        Self {
            input,
            buffer: vec![0; buffer_size],
            at: 0,
            end: 0,
            eof: false,
            engine: Engine::Unknown,
            bytes_in: 0,
        }
    }

    /// Bytes read from the input so far.
    pub fn bytes_in(&self) -> u64 {
        self.bytes_in
    }

    /// Fills `out` as far as the stream goes; less than its length only at the end.
    pub fn fill(&mut self, out: &mut [u8]) -> Result<usize, DecodeError> {
        let mut filled = 0;
        while filled < out.len() {
            match self.step(&mut out[filled..])? {
                Some(n) => filled += n,
                None => break,
            }
        }
        Ok(filled)
    }

    /// Some bytes, perhaps none; `None` at the end.
    fn step(&mut self, out: &mut [u8]) -> Result<Option<usize>, DecodeError> {
        if self.at == self.end && !self.eof {
            self.refill()?;
        }
        let input = &self.buffer[self.at..self.end];
        match &mut self.engine {
            Engine::Unknown => {
                self.detect()?;
                Ok(Some(0))
            }
            Engine::Plain => {
                if input.is_empty() {
                    return Ok(None);
                }
                let n = input.len().min(out.len());
                out[..n].copy_from_slice(&input[..n]);
                self.at += n;
                Ok(Some(n))
            }
            Engine::Gzip { inflate, member } => {
                if let Member::Stream = member {
                    let (before_in, before_out) = (inflate.total_in(), inflate.total_out());
                    let status = inflate
                        .decompress(input, out, FlushDecompress::None)
                        .map_err(|_| DecodeError::Gzip)?;
                    let consumed = (inflate.total_in() - before_in) as usize;
                    let produced = (inflate.total_out() - before_out) as usize;
                    self.at += consumed;
                    if status == Status::StreamEnd {
                        *member = Member::Trailer(gzip::TRAILER);
                    } else if consumed == 0 && produced == 0 {
                        return Err(match self.eof {
                            true => DecodeError::Truncated("gzip"),
                            false => DecodeError::Gzip,
                        });
                    }
                    return Ok(Some(produced));
                }
                let Some(&next) = input.first() else {
                    return match member {
                        Member::Ended | Member::Padding => Ok(None),
                        _ => Err(DecodeError::Truncated("gzip")),
                    };
                };
                self.at += 1;
                *member = match *member {
                    Member::Header(mut header) => match header.push(next) {
                        Some(true) => Member::Stream,
                        Some(false) => Member::Header(header),
                        None => return Err(DecodeError::Gzip),
                    },
                    Member::Trailer(1) => Member::Ended,
                    Member::Trailer(left) => Member::Trailer(left - 1),
                    Member::Ended | Member::Padding if next == 0 => Member::Padding,
                    Member::Ended if next == 0x1f => {
                        inflate.reset(false);
                        let mut header = gzip::Header::new();
                        header.push(next);
                        Member::Header(header)
                    }
                    Member::Ended | Member::Padding | Member::Stream => {
                        return Err(DecodeError::Trailing);
                    }
                };
                Ok(Some(0))
            }
            Engine::Zstd { decoder, open } => {
                if input.is_empty() && !*open {
                    return Ok(None);
                }
                // A frame's first byte goes alone: given a whole frame, zstd takes a shorter way that refuses other
                // frames than its stream does (a declared size before an empty last block), and how much is at hand
                // here is chance.
                let most = if *open { input.len() } else { 1 };
                let mut source = InBuffer::around(&input[..most.min(input.len())]);
                let mut target = OutBuffer::around(out);
                let hint = decoder
                    .run(&mut source, &mut target)
                    .map_err(DecodeError::Zstd)?;
                let (consumed, produced) = (source.pos(), target.pos());
                *open = hint != 0;
                self.at += consumed;
                if consumed == 0 && produced == 0 && self.eof {
                    return Err(DecodeError::Truncated("zstd"));
                }
                Ok(Some(produced))
            }
        }
    }

    fn detect(&mut self) -> Result<(), DecodeError> {
        // A pipe may give single bytes; zstd's magic has four.
        while self.end < 4 && !self.eof {
            self.refill()?;
        }
        let zstd = || -> Result<Engine, DecodeError> {
            let mut decoder = ZstdDecoder::new().map_err(DecodeError::Zstd)?;
            decoder
                .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))
                .map_err(DecodeError::Zstd)?;
            Ok(Engine::Zstd {
                decoder,
                open: false,
            })
        };
        self.engine = match &self.buffer[..self.end] {
            [0x1f, 0x8b, ..] => Engine::Gzip {
                inflate: Box::new(Decompress::new(false)),
                member: Member::Header(gzip::Header::new()),
            },
            [0x28, 0xb5, 0x2f, 0xfd, ..] => zstd()?,
            // A skippable frame first, as some writers of seekable zstd do.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => zstd()?,
            _ => Engine::Plain,
        };
        Ok(())
    }

    /// Reads once, behind what is in the buffer when that has not been looked at yet.
    fn refill(&mut self) -> Result<(), DecodeError> {
        if self.at == self.end {
            (self.at, self.end) = (0, 0);
        }
        loop {
            match self.input.read(&mut self.buffer[self.end..]) {
                Ok(n) => {
                    self.end += n;
                    self.bytes_in += n as u64;
                    self.eof = n == 0;
                    return Ok(());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn decode(bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
        // One byte a read and an odd buffer: every state is met at every position.
        struct Slow<'a>(&'a [u8]);
        impl Read for Slow<'_> {
            fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                let n = 1.min(out.len());
                self.0.read(&mut out[..n])
            }
        }
        let mut decoder = Decoder::new(Slow(bytes), 7);
        let mut all = Vec::new();
        loop {
            let mut out = [0; 100];
            let n = decoder.fill(&mut out)?;
            all.extend_from_slice(&out[..n]);
            if n < out.len() {
                return Ok(all);
            }
        }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        w.write_all(bytes).unwrap();
        w.finish().unwrap()
    }

    #[test]
    fn every_form_is_recognised() {
        let text: Vec<u8> = (0..3000u32).flat_map(u32::to_le_bytes).collect();
        assert_eq!(decode(&text).unwrap(), text);
        assert_eq!(decode(&gzip(&text)).unwrap(), text);
        let zstd = zstd::encode_all(&text[..], 3).unwrap();
        assert_eq!(decode(&zstd).unwrap(), text);
        assert_eq!(decode(b"").unwrap(), b"");

        let (a, b) = text.split_at(5000);
        assert_eq!(
            decode(&[gzip(a), gzip(b), vec![0; 9]].concat()).unwrap(),
            text
        );
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 9, 9, 9];
        let frames = [
            &skippable[..],
            &zstd::encode_all(a, 3).unwrap(),
            &skippable,
            &zstd::encode_all(b, 3).unwrap(),
        ];
        assert_eq!(decode(&frames.concat()).unwrap(), text);
    }

    #[test]
    fn what_is_at_hand_at_a_time_changes_nothing() {
        // A frame of no bytes that declares 35: zstd's two ways differ.
        let odd = [0x28, 0xb5, 0x2f, 0xfd, 0x20, 35, 1, 0, 0];
        let whole = Decoder::new(&odd[..], 1 << 16).fill(&mut [0; 100]);
        assert_eq!(whole.ok(), decode(&odd).ok().map(|out| out.len()));
    }

    #[test]
    fn every_cut_and_every_tail_is_noticed() {
        let text = b"some text, some text, some text";
        for whole in [gzip(text), zstd::encode_all(&text[..], 3).unwrap()] {
            for cut in 4..whole.len() {
                assert!(decode(&whole[..cut]).is_err(), "{cut}");
            }
        }
        assert!(decode(&[gzip(text), b"x".to_vec()].concat()).is_err());
        assert!(decode(&[gzip(text), b"\0x".to_vec()].concat()).is_err());
    }
}
