//! The asynchronous runtime, one for the process.
//!
//! It has no thread of its own: a thread that waits for an answer drives it, for all waiting
//! threads. Nothing runs while no thread waits, so background tasks must not be spawned on it.

use std::{io, sync::OnceLock, time::Duration};

use tokio::runtime::{Builder, Runtime};

static SHARED: OnceLock<Runtime> = OnceLock::new();

/// Returns the result of `work`, or `None` after `limit`.
///
/// # Panics
/// Where `work` is to be waited for by other asynchronous work.
pub fn within<F: Future>(limit: Duration, work: F) -> io::Result<Option<F::Output>> {
    let runtime = match SHARED.get() {
        Some(runtime) => runtime,
        None => {
            let made = Builder::new_current_thread().enable_io().enable_time().build()?;
            SHARED.get_or_init(|| made)
        }
    };
    Ok(runtime.block_on(async { tokio::time::timeout(limit, work).await.ok() }))
}

#[cfg(test)]
mod tests {
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        sync::mpsc,
        thread,
    };

    use tokio::net::UnixStream;

    use super::*;

    const SOON: Duration = Duration::from_secs(60);

    /// Waits for a byte from `stream`.
    async fn byte(stream: UnixStream) -> u8 {
        let mut byte = [0];
        loop {
            stream.readable().await.unwrap();
            match stream.try_read(&mut byte) {
                Ok(count) => {
                    assert_eq!(count, 1);
                    return byte[0];
                }
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
    }

    /// Sends a byte, for which there is room.
    fn send(stream: &UnixStream, byte: u8) {
        let sent = within(SOON, async {
            stream.writable().await.unwrap();
            stream.try_write(&[byte]).unwrap()
        });
        assert_eq!(sent.unwrap(), Some(1));
    }

    fn pair() -> (UnixStream, UnixStream) {
        within(SOON, async { UnixStream::pair().unwrap() }).unwrap().unwrap()
    }

    #[test]
    fn what_takes_longer_than_its_limit_comes_to_nothing_and_keeps_nobody_waiting() {
        let (ours, theirs) = pair();
        thread::scope(|scope| {
            // It drives the runtime meanwhile, or another does.
            let silent = scope.spawn(|| within(SOON, byte(ours)).unwrap());
            assert!(
                within(Duration::from_millis(5), std::future::pending::<()>()).unwrap().is_none()
            );
            for _ in 0..20 {
                let (here, there) = pair();
                send(&here, 7);
                assert_eq!(within(SOON, byte(there)).unwrap(), Some(7));
            }
            send(&theirs, 8);
            assert_eq!(silent.join().unwrap(), Some(8));
        });
    }

    #[test]
    fn who_drives_it_and_panics_leaves_it_to_the_others() {
        let (ours, theirs) = pair();
        let (tell, told) = mpsc::channel();
        thread::scope(|scope| {
            let waits = scope.spawn(|| within(SOON, byte(ours)).unwrap());
            let panics = scope.spawn(move || {
                let work = async {
                    tell.send(()).unwrap();
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    panic!("on purpose");
                };
                catch_unwind(AssertUnwindSafe(|| within(SOON, work))).is_err()
            });
            told.recv().unwrap();
            assert!(panics.join().unwrap());
            send(&theirs, 9);
            assert_eq!(waits.join().unwrap(), Some(9));
        });
    }
}
