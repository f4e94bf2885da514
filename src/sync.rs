//! The one door to locks and condition variables; `tests/tidy` checks that.
//!
//! With the feature `shuttle` these are a scheduler checker's, so that the tests
//! of `lock` can try thousands of interleavings. Otherwise they are the standard
//! library's. Locks here do not poison: an operation that panics is undone by
//! `lifecycle`, which brings the record back to a legal state, and must not take
//! every later operation down with it.

use std::time::Duration;

#[cfg(not(feature = "shuttle"))]
mod primitives {
    pub(crate) use std::sync::{
        Arc, Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
    };
}
#[cfg(feature = "shuttle")]
mod primitives {
    pub(crate) use shuttle::sync::{
        Arc, Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
    };
}

pub(crate) use primitives::{
    Arc, Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
};

/// Locks `mutex`, whether or not a holder panicked.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Locks `lock` for reading, whether or not a holder panicked.
pub(crate) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Locks `lock` for writing, whether or not a holder panicked.
pub(crate) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits on `condvar`, whether or not a holder panicked.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits on `condvar` while `condition` holds, but for at most `limit`, whether or not a
/// holder panicked. The scheduler checker knows no time: under it this waits for as long
/// as it takes, unless `limit` is nought.
pub(crate) fn wait_while_within<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    limit: Duration,
    condition: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    if limit.is_zero() {
        return guard;
    }
    condvar
        .wait_timeout_while(guard, limit, condition)
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .0
}
