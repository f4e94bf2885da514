//! Whatever happens in whatever order, everything is as the contract says.
//!
//! Random sequences of what people, guests, VMMs, clocks and daemons do are done to a tree on
//! a host with a fake VMM and, side by side, to a small model of the contract. After each step
//! all that can be read has to be the same. A sequence that shows a difference is shrunk to a
//! short one, which then is kept in here by name.
//!
//! `DOZED_MODEL_CASES` says how many sequences are tried, and `DOZED_MODEL_SEED` which: a
//! failure tells its seed.

mod found;
mod op;
mod reference;
mod rig;
mod threads;

use std::{
    fmt::Debug,
    hash::{BuildHasher, Hasher, RandomState},
};

use op::{Op, ops};
use proptest::{
    strategy::Strategy,
    test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner},
};
use rig::Rig;

/// How many sequences are tried where nobody says how many: a few seconds of them.
const CASES: u32 = 40;
/// How long a sequence is at most.
const STEPS_MAX: usize = 80;
/// How many shorter sequences are tried once one has failed.
const SHRINKS_MAX: u32 = 2_000;

/// Returns a number from the environment.
#[allow(clippy::disallowed_methods, reason = "a test has no command line of its own")]
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, which is no number")))
}

fn run(ops: &[Op]) {
    let mut rig = Rig::new();
    ops.iter().for_each(|op| rig.step(op));
}

/// So many cases, drawn by a seed that a failure tells.
struct SeededCases {
    seed: u64,
    cases: u32,
}

impl SeededCases {
    /// As many as the environment says, or `cases`.
    fn new(cases: u32) -> Self {
        let drawn = || RandomState::new().build_hasher().finish();
        Self {
            seed: number("DOZED_MODEL_SEED").unwrap_or_else(drawn),
            cases: number("DOZED_MODEL_CASES").map_or(cases, |cases| cases.try_into().unwrap()),
        }
    }

    /// Tries `test` with each case; one that fails is made as short as it can be.
    fn run<T: Debug>(&self, strategy: &impl Strategy<Value = T>, test: impl Fn(T)) {
        let Self { seed, cases } = *self;
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let config = Config {
            cases,
            max_shrink_iters: SHRINKS_MAX,
            failure_persistence: None,
            ..Config::default()
        };
        let tried = TestRunner::new_with_rng(config, rng).run(strategy, |case| {
            test(case);
            Ok(())
        });
        match tried {
            Ok(()) => println!("{cases} cases of DOZED_MODEL_SEED={seed}"),
            Err(TestError::Fail(why, case)) => {
                panic!("DOZED_MODEL_SEED={seed}: {why}\n\nby {case:?}");
            }
            Err(TestError::Abort(why)) => panic!("DOZED_MODEL_SEED={seed}: {why}"),
        }
    }
}

#[test]
fn whatever_happens_in_whatever_order_all_is_as_the_contract_says() {
    let steps = std::cell::Cell::new(0);
    SeededCases::new(CASES).run(&ops(STEPS_MAX), |ops| {
        steps.set(steps.get() + ops.len());
        run(&ops);
    });
    println!("{} steps", steps.get());
}
