//! Calls that may never return, because another process has to answer.
//!
//! Each call runs on its own thread, which is left behind if it does not return in time.

use std::{io, sync::mpsc, thread, time::Duration};

/// Runs `call` with a time limit.
///
/// # Errors
/// `TimedOut` where it takes longer than `limit`, and where the system gives no thread.
pub fn within<T: Send + 'static>(
    limit: Duration,
    call: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (give, take) = mpsc::sync_channel(1);
    thread::Builder::new().name("dozed-bounded".to_owned()).spawn(move || {
        // The receiver is gone after the limit.
        give.send(call()).ok();
    })?;
    take.recv_timeout(limit).map_err(|error| match error {
        mpsc::RecvTimeoutError::Timeout => io::ErrorKind::TimedOut.into(),
        mpsc::RecvTimeoutError::Disconnected => io::Error::other("the call panicked"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_returned_and_a_call_without_one_is_left_behind() {
        assert_eq!(within(Duration::from_secs(60), || 7).unwrap(), 7);
        let (hold, held) = mpsc::channel::<()>();
        let error = within(Duration::from_millis(1), move || held.recv().is_ok()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(hold);
    }

    #[test]
    fn a_panic_is_an_error_of_the_caller() {
        let answer: io::Result<()> = within(Duration::from_secs(60), || panic!("on purpose"));
        assert_eq!(answer.unwrap_err().to_string(), "the call panicked");
    }
}
