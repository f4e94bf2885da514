//! Gives the tree's answers: at once, or by jobs, so that no session thread waits.

use fuser::Errno as Number;

use super::{
    lanes::{Lanes, Share},
    once::Once,
    translate::{caught, not_taken, number},
    waiting::Waiting,
};
use crate::{
    sync::Arc,
    sys::pool::Pool,
    tree::{Answer, Caller, Job, Work},
};

/// How many jobs may read at a time. A crawler has one.
const READS_MAX: usize = 512;
/// How many of those are one user's. They may be long work for the kernel, so they are few;
/// those that hang on a stalled disk keep only their user from asking more.
const READS_OF_USER: Share = Share { threads: 8, queue: 1024 };
/// How many changes a user may have under way or waiting for a lock. A thread for each is
/// there or the request is refused: one that waited here would hold its caller's file.
const CHANGES_OF_USER: Share = Share { threads: 256, queue: 0 };

/// Gives an answer to the kernel.
pub(super) type Give<R, T> = fn(R, Result<T, Number>);

/// Runs jobs and gives answers.
#[derive(Debug)]
pub(super) struct Jobs {
    changes: Lanes,
    /// Reads that hang leave the threads of `changes` to those who write.
    reads: Lanes,
    waiting: Arc<Waiting>,
}

impl Jobs {
    /// Changes run on `pool`.
    pub(super) fn new(pool: Arc<Pool>, waiting: Arc<Waiting>) -> Self {
        let reads = Lanes::new(Arc::new(Pool::with_limit(READS_MAX)), READS_OF_USER);
        Self { changes: Lanes::new(pool, CHANGES_OF_USER), reads, waiting }
    }

    /// Gives an answer. `unwanted` is called with what a job made for a caller who was signalled
    /// meanwhile, or who is refused after all.
    pub(super) fn give<T: Send + 'static, R: Send + 'static>(
        &self,
        answer: Result<Answer<T>, Number>,
        caller: Caller,
        reply: R,
        give: Give<R, T>,
        unwanted: impl FnOnce(T) + Send + 'static,
    ) {
        match answer {
            Ok(Answer::Now(result)) => give(reply, result.map_err(number)),
            Ok(Answer::Job(work, job)) => self.run(work, job, caller, reply, give, unwanted),
            Ok(Answer::Started(value, job)) => match self.start(caller.uid, job) {
                Ok(()) => give(reply, Ok(value)),
                Err(errno) => {
                    unwanted(value);
                    give(reply, Err(errno));
                }
            },
            Err(errno) => give(reply, Err(errno)),
        }
    }

    /// Starts a job whose result nobody waits for; the file `error` has it.
    pub(super) fn start(&self, uid: u32, job: Job<()>) -> Result<(), Number> {
        let run = move || {
            caught(job).ok();
        };
        self.changes.run(uid, run).map_err(|error| not_taken(&error))
    }

    fn run<T: Send + 'static, R: Send + 'static>(
        &self,
        work: Work,
        job: Job<T>,
        caller: Caller,
        reply: R,
        give: Give<R, T>,
        unwanted: impl FnOnce(T) + Send + 'static,
    ) {
        let lanes = match work {
            Work::Read => &self.reads,
            Work::Change | Work::Attributes => &self.changes,
        };
        let reply = Once::new(reply);
        let place = (work != Work::Attributes).then(|| {
            let interrupted = reply.clone();
            let interrupt = move || {
                if let Some(reply) = interrupted.take() {
                    give(reply, Err(Number::EINTR));
                }
            };
            Place {
                waiting: Arc::clone(&self.waiting),
                number: self.waiting.enter(caller, interrupt),
            }
        });
        let mine = reply.clone();
        let queued = lanes.run(caller.uid, move || {
            if work == Work::Read && mine.is_given() {
                return; // Nobody needs it any more.
            }
            let result = caught(job).map_err(number);
            drop(place);
            match (mine.take(), result) {
                (Some(reply), result) => give(reply, result),
                (None, Ok(made)) => unwanted(made),
                (None, Err(_)) => {}
            }
        });
        if let Err(error) = queued
            && let Some(reply) = reply.take()
        {
            give(reply, Err(not_taken(&error)));
        }
    }
}

/// A caller that is looked at for signals, as long as this is there.
struct Place {
    waiting: Arc<Waiting>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.waiting.leave(self.number);
    }
}
