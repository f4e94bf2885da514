//! Joins threads with a limit.

use std::{thread::JoinHandle, time::Duration};

use super::clock::{Deadline, pause_for};

/// How often we look whether a thread has ended. The standard library cannot wait for it
/// with a limit.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Waits for a thread. Returns `false` at the deadline, and leaves the thread behind. `what` names
/// it in the log.
pub fn join_by<T>(thread: JoinHandle<T>, deadline: &Deadline, what: &str) -> bool {
    while !thread.is_finished() {
        if deadline.passed() {
            tracing::warn!("{what} did not end in time and is left behind");
            return false;
        }
        pause_for(LOOK_EVERY.min(deadline.left()));
    }
    if thread.join().is_err() {
        tracing::error!("{what} panicked");
    }
    true
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread::Builder};

    use super::*;

    #[test]
    fn a_thread_that_does_not_end_is_left_behind() {
        let (hold, held) = mpsc::channel::<()>();
        let waiting = Builder::new().spawn(move || held.recv().is_err()).unwrap();
        assert!(!join_by(waiting, &Deadline::after(Duration::from_millis(5)), "one that waits"));
        drop(hold);
        let ended = Builder::new().spawn(|| ()).unwrap();
        assert!(join_by(ended, &Deadline::after(Duration::from_secs(60)), "one that ends"));
    }
}
