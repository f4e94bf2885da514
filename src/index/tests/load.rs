//! What a start makes of the rows: the same records.

use proptest::{option, prelude::*};

use super::*;
use crate::sandbox::{ProcessIdentity, Writer};

fn any_moment() -> impl Strategy<Value = Timestamp> + Clone {
    any::<i64>().prop_map(at)
}

fn any_period() -> impl Strategy<Value = Period> + Clone {
    let seconds = option::of(1..3_000_000_000_u64);
    seconds.prop_map(|secs| {
        secs.map_or(Period::Never, |secs| Period::After(Duration::from_secs(secs)))
    })
}

fn any_text() -> impl Strategy<Value = Box<str>> + Clone {
    "[ -~é]{0,40}".prop_map(String::into_boxed_str)
}

fn any_duration() -> impl Strategy<Value = Duration> + Clone {
    (0..i64::MAX.cast_unsigned()).prop_map(Duration::from_nanos)
}

fn any_process() -> impl Strategy<Value = ProcessIdentity> {
    let numbers = any::<(u32, u64)>();
    (numbers, any_text(), option::of(any::<u64>())).prop_map(
        |((pid, start_ticks), boot_id, pidfs_inode)| ProcessIdentity {
            pid,
            boot_id,
            pidfs_inode,
            start_ticks,
        },
    )
}

fn any_snapshot() -> impl Strategy<Value = SnapshotFacts> {
    (any::<(u64, u64)>(), any_moment()).prop_map(|((generation, bytes), at)| SnapshotFacts {
        generation,
        bytes,
        at,
    })
}

fn any_spec() -> impl Strategy<Value = Arc<Spec>> {
    let kernel = option::of("/[a-z \"\\\\é]{0,9}");
    (1..=64_u8, 8..4096_u64, kernel, "[ -~]{0,40}").prop_map(|(vcpus, mib, kernel, cmdline)| {
        Arc::new(Spec {
            vcpus,
            memory_bytes: mib << 20,
            kernel: kernel.map(PathBuf::from),
            cmdline,
            ..Spec::default()
        })
    })
}

fn any_phase() -> impl Strategy<Value = Phase> {
    let (process, snapshot) = (option::of(any_process()), option::of(any_snapshot()));
    let state = proptest::sample::select(State::ALL.as_slice());
    (state, process, snapshot)
        .prop_filter_map("they do not go together", |(state, process, snapshot)| {
            Phase::of(state, process, snapshot).ok()
        })
}

prop_compose! {
    fn any_waking()(
        cause in option::of(any_text()),
        (day, of_day) in any::<(i32, u32)>(),
        (slept_idle, in_vain) in any::<(bool, u8)>(),
        awake_until in option::of(any_moment()),
    ) -> Waking {
        Waking { cause, day, of_day, slept_idle, in_vain, awake_until }
    }
}

fn any_writer() -> impl Strategy<Value = Arc<Writer>> {
    any::<(u32, u32, Vec<u32>)>()
        .prop_map(|(uid, gid, groups)| Writer::new(uid, gid, groups).into())
}

prop_compose! {
    fn any_record()(
        id in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",
        (uid, gid) in any::<(u32, u32)>(),
        phase in any_phase(),
        (since, created_at, retry_at) in (any_moment(), any_moment(), option::of(any_moment())),
        (spec, config_by) in (any_spec(), option::of(any_writer())),
        (idle_after, delete_after, pinned) in (any_period(), any_period(), any::<bool>()),
        (user, slot) in any::<(Option<u32>, Option<u32>)>(),
        (vmm, error) in (option::of(any_text()), option::of(any_text())),
        (last_sleep, last_wake) in (option::of(any_duration()), option::of(any_duration())),
        (generation, sleeps, wakes) in any::<(u64, u64, u64)>(),
        waking in any_waking(),
    ) -> Record {
        Record {
            row: RowId(0),
            id: id.parse().unwrap(),
            owner: Owner { uid, gid },
            phase,
            since,
            created_at,
            generation,
            spec,
            config_by,
            idle_after,
            delete_after,
            pinned,
            vmm,
            user,
            slot,
            sleeps,
            wakes,
            last_sleep,
            last_wake,
            error,
            retry_at,
            waking,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_record_is_after_a_start_what_it_was(record in any_record(), last in any::<i64>()) {
        let host = Host::new();
        let row = {
            let connection = lock(&host.index.connection);
            row::insert(connection.as_ref().unwrap(), &record, at(last)).unwrap()
        };
        let host = host.reopened();
        let entry = host.index.by_row(row).unwrap();
        prop_assert_eq!(entry.last_activity(), at(last));
        prop_assert_eq!(&*entry.record(), &Record { row, ..record });
    }
}
