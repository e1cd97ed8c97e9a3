//! Bytes as what lies in a node's cache folder, found by a server that starts and changed while it runs. Whatever is
//! there, a reader gets the right bytes or, where no source has them, an error; and what the cache says that it holds
//! is what a server that opens it next finds.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use berth_fuse::chunks::{CHUNK, Cache, ChunkStore, Sealed};
use berth_squashfs::read::ReadAt;

use super::Target;
use super::chunks::{BLOCKS_A_CHUNK, Memory, sealed_file, sources, wait_until};

pub const TARGET: Target = Target {
    name: "cache",
    run,
    seeds,
};

/// An image file, what is sealed of it, and in how many chunks it is divided.
struct Image {
    file: Arc<Vec<u8>>,
    sealed: Sealed,
    chunks: usize,
}

/// Nine chunks of data, the last one short, whose tree has a level above its leaves; and one without.
static IMAGES: LazyLock<[Image; 2]> = LazyLock::new(|| {
    [(8 * BLOCKS_A_CHUNK + 3, 10), (5, 2)].map(|(blocks, chunks)| {
        let (file, sealed) = sealed_file(blocks);
        Image {
            file,
            sealed,
            chunks,
        }
    })
});

/// Where the folder is made that each input fills anew; `scripts/fuzz` says where and removes it.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("berth-fuzz-cache-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the cache");
    folder
});

const HEAD: usize = 64;
/// Another image's root: what is kept of it is older and nobody reads it.
const OTHER: [u8; 32] = [0xee; 32];

fn name(root: &[u8; 32], ending: &str) -> PathBuf {
    FOLDER.join(format!("{}.{ending}", berth_image::digest::hex(root)))
}

fn map(image: &Image) -> Vec<u8> {
    let mut map = b"berth-chunks-2\0\0".to_vec();
    map.extend(CHUNK.to_le_bytes());
    map.extend((image.chunks as u64).to_le_bytes());
    map.extend(image.sealed.root);
    map.resize(HEAD + image.chunks, 1);
    map
}

/// A cache and the image in it, as one server has them.
struct Server {
    image: &'static Image,
    cache: Arc<Cache>,
    store: Option<Arc<ChunkStore>>,
}

impl Server {
    fn start(image: &'static Image, limit: u64, source: Option<&Memory>) -> Self {
        let cache = Cache::open(&FOLDER, Some(limit)).expect("a folder of our own");
        let mut server = Self {
            image,
            cache,
            store: None,
        };
        server.open(source);
        server
    }

    fn open(&mut self, source: Option<&Memory>) {
        let all = source.map(|source| Box::new(source.clone()) as _);
        let opened = ChunkStore::open(
            self.image.sealed,
            sources(all.into_iter().collect()),
            Some(&self.cache),
        );
        assert!(opened.is_ok() || source.is_none(), "a source that has all");
        self.store = opened.ok();
        self.sane();
    }

    /// Lets go of the image, and waits for the threads that still fetch something of it.
    fn close(&mut self) {
        self.store = None;
        wait_until("the image is closed", || {
            Arc::strong_count(&self.cache) == 1
        });
    }

    fn sane(&self) {
        assert!(
            self.cache.used() < 1 << 30,
            "{} bytes are said to be kept",
            self.cache.used()
        );
    }
}

fn run(data: &[u8]) {
    let Some((&[flags, limit], data)) = data.split_first_chunk::<2>() else {
        return;
    };
    let image = &IMAGES[usize::from(flags >> 4) % 2];
    let (file, sealed) = (&image.file, &image.sealed);
    let files = std::fs::read_dir(&*FOLDER).expect("our folder");
    for file in files {
        let _ = std::fs::remove_file(file.expect("our folder").path());
    }
    // The map: as it comes, or the right one with some bytes changed.
    let (len, data) = data
        .split_first()
        .map_or((0, data), |(len, rest)| (usize::from(*len), rest));
    let (bytes, mut data) = data.split_at(len.min(data.len()));
    let mut found = bytes.to_vec();
    if flags & 1 != 0 {
        found = map(image);
        found
            .iter_mut()
            .zip(bytes)
            .for_each(|(byte, change)| *byte ^= change);
    }
    let write = |path: &Path, bytes: &[u8]| std::fs::write(path, bytes).expect("our folder");
    write(&name(&sealed.root, "map"), &found);
    write(
        &name(&sealed.root, "data"),
        if flags & 2 != 0 { file } else { bytes },
    );
    write(&name(&OTHER, "map"), bytes);
    write(&name(&OTHER, "data"), &file[..(len * 256).min(file.len())]);
    let memory = Memory::new(file);
    let source = (flags & 4 != 0).then_some(&memory);
    let limit = match flags & 8 {
        0 => u64::MAX / 2,
        _ => u64::from(limit) * CHUNK / 16,
    };
    let disk = OpenOptions::new()
        .write(true)
        .open(name(&sealed.root, "data"));
    let disk = disk.expect("our folder");
    let mut server = Server::start(image, limit, source);
    while let Some((&[what, one, two, three, four, five], rest)) = data.split_first_chunk::<6>() {
        data = rest;
        let at =
            (u64::from_le_bytes([one, two, three, 0, 0, 0, 0, 0])) % (file.len() as u64 + CHUNK);
        match what % 8 {
            0 => damage(&disk, at, &[five; 3][..usize::from(four) % 4]),
            1 => disk.set_len(at).expect("our file"),
            2 => server.open(source),
            3 => again(&mut server, source),
            4 => {
                server.close();
                drop(server);
                server = Server::start(image, limit, source);
            }
            _ => read(
                &server,
                at,
                usize::from(u16::from_le_bytes([four, five])) * 8,
                source,
            ),
        }
    }
    server.close();
}

fn damage(disk: &File, at: u64, bytes: &[u8]) {
    disk.write_all_at(bytes, at).expect("our file");
}

/// The image closed and opened: nothing of what is said to be kept gets lost or is counted twice.
fn again(server: &mut Server, source: Option<&Memory>) {
    server.close();
    let before = server.cache.used();
    server.open(source);
    assert!(
        server.cache.used() <= before,
        "kept {before}, found {}",
        server.cache.used()
    );
}

fn read(server: &Server, at: u64, len: usize, source: Option<&Memory>) {
    let (file, sealed) = (&server.image.file, &server.image.sealed);
    let Some(store) = &server.store else {
        return;
    };
    let mut out = vec![0; len];
    let within = at + len as u64 <= sealed.hash_offset;
    match store.read_exact_at(&mut out, at) {
        Ok(()) => assert!(within && out == file[at as usize..][..len], "bytes at {at}"),
        Err(error) => assert!(!within || source.is_none(), "{error}"),
    }
    server.sane();
}

fn seeds() -> Vec<Vec<u8>> {
    let read = |at: u32, len: u16| {
        let [one, two, three, _] = at.to_le_bytes();
        let [four, five] = (len / 8).to_le_bytes();
        [5, one, two, three, four, five]
    };
    let (damage, cut) = ([0, 9, 0, 1, 3, 7], [1, 0, 0, 2, 0, 0]);
    let (open, again, restart) = ([2; 6], [3; 6], [4; 6]);
    let some = [
        read(0, 8),
        read(65_000, 60_000),
        damage,
        again,
        read(65_000, 60_000),
    ]
    .concat();
    let more = [
        read(530_000, 4096),
        cut,
        restart,
        read(0, 65_000),
        open,
        read(9, 99),
        again,
    ]
    .concat();
    let head =
        |flags: u8, limit: u8, bytes: &[u8]| [&[flags, limit, bytes.len() as u8], bytes].concat();
    let mut lost = vec![0; HEAD + 10];
    lost[HEAD + 3..].fill(1);
    vec![
        [head(7, 0, &[]), some.clone()].concat(),
        [head(3, 0, &[]), more.clone()].concat(),
        [head(5, 0, &lost), some.clone(), more.clone()].concat(),
        [head(13, 64, &lost), more.clone(), some.clone()].concat(),
        [head(12, 40, b"berth-chunks-2"), some.clone()].concat(),
        // The small image, a byte of its salt, and the same anew.
        [
            head(0x17, 0, &[]),
            read(0, 8).to_vec(),
            [0, 88, 0x50, 0, 1, 9].to_vec(),
            again.to_vec(),
            read(0, 20_000).to_vec(),
        ]
        .concat(),
        [head(4, 0, &map(&IMAGES[0])), more, some].concat(),
    ]
}
