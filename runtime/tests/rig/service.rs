//! The node service as far as steps see it: it mounts what it is given, and remembers who holds a lease.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use berth_mount::keeper::{self, Answer, How, Request};
use berth_mount::packets::{Packet, Packets};
use berth_mount::{ImageFile, LoopDevice};
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen,
    shutdown, socket_with,
};

use super::Site;

/// A running service.
pub struct Service {
    listener: Arc<OwnedFd>,
    leases: Arc<Mutex<Vec<Packets>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Service {
    /// Listens where the site's configuration says, which it is told.
    pub fn start(site: &mut Site) -> Service {
        let socket = site.path("node.sock");
        let line = format!("[node.service]\nsocket = '{}'\n", socket.display());
        site.node.push_str(&line);
        std::fs::create_dir_all(site.path("run")).unwrap();
        let flags = SocketFlags::CLOEXEC;
        let kind = SocketType::SEQPACKET;
        let listener = socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
        let root = keeper::root_socket(&socket);
        bind(&listener, &SocketAddrUnix::new(root).unwrap()).unwrap();
        listen(&listener, 16).unwrap();
        let listener = Arc::new(listener);
        let leases = Arc::<Mutex<Vec<Packets>>>::default();
        let (heard, given, run_dir) = (listener.clone(), leases.clone(), site.path("run"));
        let thread = std::thread::spawn(move || {
            while let Ok(connection) = accept(&heard) {
                let connection = Packets::new(connection);
                let packet = connection.receive(soon()).unwrap().unwrap();
                mount(&connection, packet, &run_dir);
                given.lock().unwrap().push(connection);
            }
        });
        Service {
            listener,
            leases,
            thread: Some(thread),
        }
    }

    /// How many mounts were given.
    pub fn given(&self) -> usize {
        self.leases.lock().unwrap().len()
    }

    /// As when it drains.
    pub fn hurry(&self) {
        for lease in self.leases.lock().unwrap().iter() {
            // Who is gone does not hear.
            let _ = lease.send(b"drain", &[], Instant::now());
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        shutdown(&*self.listener, Shutdown::Both).unwrap();
        let _ = self.thread.take().unwrap().join();
    }
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(30))
}

fn mount(connection: &Packets, packet: Packet, run_dir: &Path) {
    let Request::Mount(request) = keeper::decode::<Request>(&packet.bytes).unwrap() else {
        panic!("steps ask for mounts only");
    };
    let image = ImageFile {
        file: packet.descriptors[0].as_fd(),
        data_size: request.hash_offset,
        label: &request.verity_root[..32],
    };
    let device = LoopDevice::attach(image, run_dir).unwrap();
    let tree = device.mount().unwrap();
    let answer = Answer::Mounted {
        how: How::Kernel,
        kept: true,
    };
    let bytes = keeper::encode(&answer).unwrap();
    (connection.send(&bytes, &[tree.as_fd()], soon().unwrap())).unwrap();
}
