//! Which image, and how its bytes are got: the options of all that serve one image.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_fuse::chunks::{
    Cache, ChunkStore, FileSource, HttpSource, Pace, Sealed, Source, SourceError, Sources,
};
use berth_image::trace::Trace;
use berth_squashfs::read::ReadAt;
use clap::Args;

use crate::Failure;

/// Where an image's bytes come from, besides its file. The variable BERTH_GRANT holds the grant to show to HTTP
/// sources, where one is needed, or one for each of several, in their order, with spaces between.
#[derive(Args, Clone, Debug)]
pub struct Lazy {
    /// The sealed root of the image's hash tree: every byte is checked against it.
    #[arg(long, value_name = "HEX", requires = "hash_offset", value_parser = parse_root)]
    pub verity_root: Option<Root>,
    /// Where the hash tree starts in the image file.
    #[arg(long, value_name = "BYTES", requires = "verity_root")]
    pub hash_offset: Option<u64>,
    /// More places to get the image from, asked in this order: files, URLs, or SOCKET:/PATH.
    #[arg(long = "from", value_name = "SOURCE", requires = "verity_root")]
    pub sources: Vec<String>,
    /// Fetch by this HTTP proxy.
    #[arg(long, value_name = "URL", requires = "verity_root")]
    pub proxy: Option<String>,
    /// Keep what was fetched in this folder, which all images of a node share.
    #[arg(long, value_name = "DIR", requires = "verity_root")]
    pub cache: Option<PathBuf>,
    /// Most bytes to keep there; a tenth of its filesystem without this.
    #[arg(long, value_name = "BYTES")]
    pub cache_limit: Option<u64>,
    /// Fetch first what this trace names.
    #[arg(long, value_name = "FILE", requires = "cache")]
    pub trace: Option<PathBuf>,
    /// Write a trace of what is read until the image is unmounted.
    #[arg(long, value_name = "FILE", requires = "verity_root")]
    pub record: Option<PathBuf>,
    /// Fetch the rest as well, at so many bytes a second, as long as no reader waits.
    #[arg(long, value_name = "BYTES", requires = "cache")]
    pub fill: Option<u64>,
}

/// A recording that is written when its image is served no more.
#[derive(Debug)]
pub struct Recording {
    store: Arc<ChunkStore>,
    file: PathBuf,
}

impl Recording {
    /// Writes what was read until now: a whole file, or none.
    pub fn finish(self) -> Result<(), Failure> {
        let trace = self.store.recorded().ok_or("nothing was recorded")??;
        let mut part = self.file.clone().into_os_string();
        part.push(".part");
        std::fs::write(&part, trace.to_json())
            .and_then(|()| std::fs::rename(&part, &self.file))
            .map_err(|error| format!("cannot write \"{}\": {error}", self.file.display()))?;
        Ok(())
    }
}

/// 32 bytes, in hex on the command line.
#[derive(Clone, Copy, Debug)]
pub struct Root(pub [u8; 32]);

/// Reads one.
pub fn parse_root(text: &str) -> Result<Root, String> {
    let wrong = || "not 64 hexadecimal digits".to_owned();
    let mut root = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return Err(wrong());
    }
    for (at, byte) in root.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).map_err(|_| wrong())?;
    }
    Ok(Root(root))
}

/// What is shown to HTTP sources, in their order.
#[derive(Debug)]
struct Grants<'a>(Vec<&'a str>);

impl<'a> Grants<'a> {
    fn read(text: &'a str) -> Self {
        let mut grants: Vec<&str> = text.split_whitespace().collect();
        grants.reverse();
        Self(grants)
    }

    /// The next source's; the last one is all the others' too.
    fn next(&mut self) -> Option<&'a str> {
        match self.0.len() {
            0 | 1 => self.0.first().copied(),
            _ => self.0.pop(),
        }
    }
}

impl Lazy {
    /// The same options again, for a server's command line.
    pub fn arguments(&self) -> Vec<String> {
        let (Some(Root(root)), Some(hash_offset)) = (self.verity_root, self.hash_offset) else {
            return Vec::new();
        };
        let hex = root.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut all = vec![
            "--verity-root".to_owned(),
            hex,
            format!("--hash-offset={hash_offset}"),
        ];
        all.extend(self.sources.iter().map(|source| format!("--from={source}")));
        all.extend(self.proxy.iter().map(|proxy| format!("--proxy={proxy}")));
        let limit = self.cache_limit.iter();
        all.extend(limit.map(|limit| format!("--cache-limit={limit}")));
        all.extend(self.fill.iter().map(|rate| format!("--fill={rate}")));
        let paths = [
            ("cache", &self.cache),
            ("trace", &self.trace),
            ("record", &self.record),
        ];
        let paths = paths
            .iter()
            .filter_map(|(name, path)| Some((name, path.as_deref()?)));
        all.extend(paths.map(|(name, path)| format!("--{name}={}", path.display())));
        all
    }

    /// The image as a source for the reader. A fetch gives up well before `deadline`, so that a request ends with the
    /// reason in the log.
    pub fn open(
        &self,
        image: Option<OwnedFd>,
        deadline: Duration,
    ) -> Result<Box<dyn ReadAt>, Failure> {
        let (Some(Root(root)), Some(hash_offset)) = (self.verity_root, self.hash_offset) else {
            let image = image.ok_or("an image that is no file needs --verity-root")?;
            return Ok(Box::new(File::from(image)));
        };
        let sealed = Sealed { root, hash_offset };
        Ok(Box::new(self.store(sealed, image, deadline)?))
    }

    /// The same, for who serves it: with what is fetched before anybody asks, and a recording if one is wanted.
    pub fn open_to_serve(
        &self,
        image: Option<OwnedFd>,
        deadline: Duration,
    ) -> Result<(Box<dyn ReadAt>, Option<Recording>), Failure> {
        let (Some(Root(root)), Some(hash_offset)) = (self.verity_root, self.hash_offset) else {
            return Ok((self.open(image, deadline)?, None));
        };
        let sealed = Sealed { root, hash_offset };
        let store = self.store(sealed, image, deadline)?;
        if let Some(file) = &self.trace {
            let text = std::fs::read(file)
                .map_err(|error| format!("cannot read \"{}\": {error}", file.display()))?;
            let trace = Trace::from_json(&root, hash_offset, &text)?;
            store.replay(&trace, Pace::default());
        }
        if let Some(rate) = self.fill {
            store.fill(Pace {
                bytes_per_s: Some(rate),
                last: true,
            });
        }
        let recording = self.record.clone().map(|file| {
            store.record();
            let store = Arc::clone(&store);
            Recording { store, file }
        });
        Ok((Box::new(store), recording))
    }

    fn store(
        &self,
        sealed: Sealed,
        image: Option<OwnedFd>,
        deadline: Duration,
    ) -> Result<Arc<ChunkStore>, Failure> {
        let mut sources: Vec<Box<dyn Source>> = Vec::new();
        if let Some(image) = image {
            sources.push(Box::new(FileSource::new(image.into(), "the image file")));
        }
        let given = std::env::var("BERTH_GRANT").unwrap_or_default();
        let mut grants = Grants::read(&given);
        for source in &self.sources {
            match self.source(source, &mut grants) {
                Ok(source) => sources.push(source),
                Err(error) => tracing::warn!(source, %error, "a source is left out"),
            }
        }
        let cache = self
            .cache
            .as_ref()
            .map(|folder| Cache::open(folder, self.cache_limit));
        let cache = cache.and_then(|cache| match cache {
            Ok(cache) => Some(cache),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "goes on without a cache");
                None
            }
        });
        let sources = Sources::new(sources, deadline * 4 / 5);
        Ok(ChunkStore::open(sealed, sources, cache.as_ref())?)
    }

    fn source(
        &self,
        source: &str,
        grants: &mut Grants<'_>,
    ) -> Result<Box<dyn Source>, SourceError> {
        if source.contains("://") || source.starts_with('/') && source.contains(":/") {
            let proxy = self.proxy.as_deref();
            return Ok(Box::new(HttpSource::new(source, grants.next(), proxy)?));
        }
        let file = File::open(Path::new(source)).map_err(|error| SourceError::Failed {
            source_name: source.to_owned(),
            what: error.to_string(),
        })?;
        Ok(Box::new(FileSource::new(file, source)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_grant_is_for_all_and_several_are_for_one_each() {
        let shown = |text: &str| {
            let mut grants = Grants::read(text);
            [(), (), ()].map(|()| grants.next().map(str::to_owned))
        };
        let (a, b) = (Some("a".to_owned()), Some("b".to_owned()));
        assert_eq!(shown(""), [None, None, None]);
        assert_eq!(shown("a"), [a.clone(), a.clone(), a.clone()]);
        assert_eq!(shown("a b"), [a, b.clone(), b]);
    }
}
