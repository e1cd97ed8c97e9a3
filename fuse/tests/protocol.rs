//! The protocol without a mount: requests as the kernel sends them, answers as it takes them.

#[path = "../../squashfs/tests/common/mod.rs"]
mod common;

use berth_fuse::abi::{Request, op};
use berth_fuse::fs::ImageFs;
use berth_fuse::fuse::{Action, dispatch};
use berth_squashfs::read::{CacheSizes, Reader};
use rustix::io::Errno;

fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&((40 + body.len()) as u32).to_ne_bytes());
    bytes.extend_from_slice(&opcode.to_ne_bytes());
    bytes.extend_from_slice(&77u64.to_ne_bytes());
    bytes.extend_from_slice(&node.to_ne_bytes());
    bytes.resize(40, 0);
    bytes.extend_from_slice(body);
    bytes
}

struct Kernel(ImageFs<Vec<u8>>);

impl Kernel {
    fn new(image: Vec<u8>) -> Self {
        Self(ImageFs::new(Reader::open(image, CacheSizes::default()).unwrap()).unwrap())
    }

    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let bytes = request(opcode, node, body);
        let mut out = Vec::new();
        match dispatch(&self.0, &Request::parse(&bytes).unwrap(), &mut out) {
            Action::Answer(result) => result.map(|()| out),
            other => panic!("{other:?}"),
        }
    }

    fn read(&self, opcode: u32, node: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let mut body = vec![0; 8];
        body.extend_from_slice(&offset.to_ne_bytes());
        body.extend_from_slice(&size.to_ne_bytes());
        body.resize(40, 0);
        self.ask(opcode, node, &body)
    }

    /// Names, node ids (with `plus`) and positions of a folder.
    fn list(&self, node: u64, plus: bool, room: u32) -> Vec<(Vec<u8>, u64, u64)> {
        let (mut all, mut offset) = (Vec::new(), 0);
        let opcode = if plus { op::READDIRPLUS } else { op::READDIR };
        loop {
            let answer = self.read(opcode, node, offset, room).unwrap();
            assert!(answer.len() <= room as usize);
            if answer.is_empty() {
                return all;
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let id = if plus { u64_at(rest, 0) } else { 0 };
                let entry = &rest[if plus { 128 } else { 0 }..];
                let name_len = u64_at(entry, 16) as u32 as usize;
                offset = u64_at(entry, 8);
                all.push((entry[24..24 + name_len].to_vec(), id, offset));
                rest = &entry[(24 + name_len).next_multiple_of(8)..];
            }
        }
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn image() -> Option<Vec<u8>> {
    common::have("mksquashfs").then(|| {
        let dir = tempfile::tempdir().unwrap();
        let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
        common::make_tree(&tree);
        let options = ["-noappend", "-quiet", "-no-progress", "-comp", "zstd"];
        let mut args = vec![tree.as_os_str(), image.as_os_str()];
        args.extend(options.map(std::ffi::OsStr::new));
        common::run("mksquashfs", &args);
        std::fs::read(image).unwrap()
    })
}

#[test]
fn answers_are_what_the_image_holds() {
    let Some(image) = image() else { return };
    let expected = common::of_image(&Reader::open(&image, CacheSizes::default()).unwrap());
    let kernel = Kernel::new(image);
    let mut todo = vec![(Vec::new(), 1u64)];
    let mut seen = 0;
    while let Some((path, node)) = todo.pop() {
        let want = &expected[&path];
        seen += 1;
        let attr = kernel.ask(op::GETATTR, node, &[0; 16]).unwrap();
        assert_eq!(attr.len(), 104);
        assert_eq!(u64_at(&attr, 16), want.ino);
        assert_eq!(u64_at(&attr, 24), want.size);
        assert_eq!(u64_at(&attr, 16 + 60) as u32, want.mode);
        match want.mode & 0o170000 {
            0o040000 => {
                let plus = kernel.list(node, true, 4096);
                let plain = kernel.list(node, false, 600);
                assert_eq!(plain.len(), plus.len());
                assert!(
                    plain
                        .iter()
                        .zip(&plus)
                        .all(|(a, b)| a.0 == b.0 && a.2 == b.2)
                );
                assert_eq!((&plus[0].0[..], &plus[1].0[..]), (&b"."[..], &b".."[..]));
                for (name, id, _) in &plus[2..] {
                    let mut lookup = name.clone();
                    lookup.push(0);
                    let entry = kernel.ask(op::LOOKUP, node, &lookup).unwrap();
                    assert_eq!((entry.len(), u64_at(&entry, 0)), (128, *id));
                    let mut below = path.clone();
                    if !below.is_empty() {
                        below.push(b'/');
                    }
                    below.extend_from_slice(name);
                    todo.push((below, *id));
                }
            }
            0o100000 => {
                let mut all = Vec::new();
                while all.len() < want.size as usize {
                    let offset = all.len() as u64;
                    all.extend(kernel.read(op::READ, node, offset, 131_072).unwrap());
                }
                assert_eq!(Some(common::hash(&all)), want.content);
                assert_eq!(kernel.read(op::READ, node, want.size, 10), Ok(vec![]));
            }
            0o120000 => {
                let target = kernel.ask(op::READLINK, node, &[]).unwrap();
                assert_eq!(Some(target), want.target);
            }
            _ => {}
        }
        for (name, value) in &want.xattrs {
            let mut body = vec![0, 1, 0, 0, 0, 0, 0, 0];
            body.extend_from_slice(name);
            body.push(0);
            match kernel.ask(op::GETXATTR, node, &body) {
                Ok(got) => assert_eq!(&got, value),
                Err(errno) => assert!(errno == Errno::RANGE && value.len() > 256),
            }
            body[1] = 0;
            let size = kernel.ask(op::GETXATTR, node, &body).unwrap();
            assert_eq!(u64_at(&size, 0), value.len() as u64);
        }
    }
    assert_eq!(seen, expected.len());
}

#[test]
fn what_the_kernel_need_not_ask_again() {
    let Some(image) = image() else { return };
    let kernel = Kernel::new(image);
    let missing = kernel.ask(op::LOOKUP, 1, b"no such name\0").unwrap();
    assert_eq!(u64_at(&missing, 0), 0, "no node");
    assert!(u64_at(&missing, 16) > 1 << 30, "and that may be kept");
    for opcode in [op::OPEN, op::OPENDIR, 25, op::RELEASE, 34, 46] {
        assert_eq!(kernel.ask(opcode, 1, &[0; 32]), Err(Errno::NOSYS));
    }
    for opcode in [op::WRITE, op::CREATE, op::UNLINK, op::SETATTR] {
        assert_eq!(kernel.ask(opcode, 1, &[0; 64]), Err(Errno::ROFS));
    }
    assert_eq!(kernel.read(op::READ, 1, 0, 10), Err(Errno::ISDIR));
    assert_eq!(kernel.ask(op::READLINK, 1, &[]), Err(Errno::INVAL));
    assert_eq!(kernel.ask(op::GETATTR, 0, &[]), Err(Errno::NOENT));
    // A position that is none gives no name that is not there, and no end of the world.
    let all = kernel.list(1, true, 1 << 16);
    for offset in [3, 50, 1 << 20, u64::MAX] {
        let answer = kernel.read(op::READDIRPLUS, 1, offset, 4096).unwrap();
        if !answer.is_empty() {
            assert!(all.iter().any(|(_, id, _)| *id == u64_at(&answer, 0)));
        }
    }
}

#[test]
fn an_old_kernel_is_refused_and_a_new_one_followed() {
    let Some(image) = image() else { return };
    let kernel = Kernel::new(image);
    let init = |major: u32, minor: u32, flags: u32| {
        let mut body = Vec::new();
        for field in [major, minor, 131_072, flags] {
            body.extend_from_slice(&field.to_ne_bytes());
        }
        kernel.ask(op::INIT, 0, &body)
    };
    assert_eq!(init(7, 12, u32::MAX), Err(Errno::PROTO));
    assert_eq!(init(7, 31, 0), Err(Errno::PROTO));
    let answer = init(7, 45, u32::MAX).unwrap();
    assert_eq!(answer.len(), 64);
    assert_eq!(u64_at(&answer, 0), 7 | 38 << 32);
    let answer = init(7, 31, u32::MAX).unwrap();
    assert_eq!(u64_at(&answer, 0), 7 | 31 << 32);
}

#[test]
fn cut_and_garbled_requests_are_errors() {
    let Some(image) = image() else { return };
    let kernel = Kernel::new(image);
    assert!(Request::parse(&[]).is_none());
    assert!(Request::parse(&request(1, 1, b"x\0")[..41]).is_none());
    let mut state = 1u64;
    for opcode in 1..60 {
        for len in [0, 1, 8, 16, 39, 64] {
            let body: Vec<u8> = (0..len)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    (state >> 60) as u8
                })
                .collect();
            for node in [1, 2, 500, state, u64::MAX] {
                let bytes = request(opcode, node, &body);
                dispatch(&kernel.0, &Request::parse(&bytes).unwrap(), &mut Vec::new());
            }
        }
    }
}
