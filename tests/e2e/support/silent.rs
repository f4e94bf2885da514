//! A file system that does not answer.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

use dozed::sys::mount::abort;
use rustix::mount::{MountFlags, mount};

/// How far the server of a [`SilentMount`] gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Silence {
    /// It reads no request. Whoever waits for it can be killed.
    Deaf,
    /// It reads every request. Whoever waits for it stays, also when killed.
    Mute,
}

/// A FUSE file system whose server does not answer, mounted over a directory for as long as
/// this lives.
#[derive(Debug)]
pub(crate) struct SilentMount {
    dir: PathBuf,
    /// Open for as long as the file system is to be there.
    _connection: File,
    server: Option<JoinHandle<()>>,
}

impl SilentMount {
    pub(crate) fn over(dir: &Path, silence: Silence) -> Self {
        let connection = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let number = connection.as_raw_fd();
        let options = format!("fd={number},rootmode=40000,user_id=0,group_id=0,allow_other\0");
        let options = std::ffi::CString::from_vec_with_nul(options.into_bytes()).unwrap();
        mount("silent", dir, "fuse", MountFlags::empty(), options.as_c_str()).unwrap();
        let server = (silence == Silence::Mute).then(|| {
            let connection = connection.try_clone().unwrap();
            let server = thread::Builder::new().name("silent".to_owned());
            server.spawn(move || read_all(connection)).unwrap()
        });
        Self { dir: dir.to_owned(), _connection: connection, server }
    }
}

impl Drop for SilentMount {
    fn drop(&mut self) {
        // Whoever waits for it is let go.
        abort(&self.dir).unwrap();
        if let Some(server) = self.server.take() {
            server.join().unwrap();
        }
    }
}

/// Answers the first request, which begins the protocol (`struct fuse_init_out`), and reads the
/// others until the file system is gone.
fn read_all(mut connection: File) {
    let mut request = vec![0; 256 * 1024];
    if connection.read(&mut request).is_err() {
        return;
    }
    let unique = &request[8..16];
    // Its version, 7.31; buffers, and no options.
    let init = [7_u32, 31, 4096, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let init: Vec<u8> = init.into_iter().flat_map(u32::to_ne_bytes).collect();
    let length = u32::try_from(16 + init.len()).unwrap();
    let head = [&length.to_ne_bytes()[..], &0_u32.to_ne_bytes(), unique].concat();
    if connection.write_all(&[head, init].concat()).is_err() {
        return;
    }
    while connection.read(&mut request).is_ok() {}
}
