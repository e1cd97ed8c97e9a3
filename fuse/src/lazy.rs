//! Which image, and how its bytes are got: the options of both `mount` and `serve`.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_fuse::chunks::{
    CacheFile, ChunkStore, FileOrigin, HttpOrigin, Origin, OriginError, Origins, Sealed,
};
use berth_squashfs::read::ReadAt;
use clap::Args;

use crate::Failure;

/// Where an image's bytes come from, besides its file.
#[derive(Args, Clone, Debug)]
pub struct Lazy {
    /// The sealed root of the image's hash tree: every byte is checked against it.
    #[arg(long, value_name = "HEX", requires = "hash_offset", value_parser = parse_root)]
    pub verity_root: Option<Root>,
    /// Where the hash tree starts in the image file.
    #[arg(long, value_name = "BYTES", requires = "verity_root")]
    pub hash_offset: Option<u64>,
    /// More places to get the image from, asked in this order: files or http:// URLs.
    #[arg(long = "from", value_name = "SOURCE", requires = "verity_root")]
    pub sources: Vec<String>,
    /// Fetch by this HTTP proxy.
    #[arg(long, value_name = "URL", requires = "verity_root")]
    pub proxy: Option<String>,
    /// Keep what was fetched in this folder.
    #[arg(long, value_name = "DIR", requires = "verity_root")]
    pub cache: Option<PathBuf>,
    /// Most bytes to keep there for this image.
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 30)]
    pub cache_limit: u64,
}

/// 32 bytes, in hex on the command line.
#[derive(Clone, Copy, Debug)]
pub struct Root(pub [u8; 32]);

fn parse_root(text: &str) -> Result<Root, String> {
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
            format!("--cache-limit={}", self.cache_limit),
        ];
        all.extend(self.sources.iter().map(|source| format!("--from={source}")));
        all.extend(self.proxy.iter().map(|proxy| format!("--proxy={proxy}")));
        let cache = self.cache.iter();
        all.extend(cache.map(|folder| format!("--cache={}", folder.display())));
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
        let mut origins: Vec<Box<dyn Origin>> = Vec::new();
        if let Some(image) = image {
            origins.push(Box::new(FileOrigin::new(image.into(), "the image file")));
        }
        for source in &self.sources {
            match self.origin(source) {
                Ok(origin) => origins.push(origin),
                Err(error) => tracing::warn!(source, %error, "a source is left out"),
            }
        }
        let sealed = Sealed { root, hash_offset };
        let store = ChunkStore::open(
            sealed,
            Origins::new(origins, deadline * 4 / 5),
            |pieces| {
                let folder = self.cache.as_deref();
                folder.map(|folder| CacheFile::open(folder, &root, pieces))
            },
            self.cache_limit,
        )?;
        Ok(Box::new(store))
    }

    fn origin(&self, source: &str) -> Result<Box<dyn Origin>, OriginError> {
        if source.starts_with("http://") {
            return Ok(Box::new(HttpOrigin::new(source, self.proxy.as_deref())?));
        }
        let file = File::open(Path::new(source)).map_err(|error| OriginError::Failed {
            origin: source.to_owned(),
            what: error.to_string(),
        })?;
        Ok(Box::new(FileOrigin::new(file, source)))
    }
}
