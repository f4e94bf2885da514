//! What the counter guest prints, held against what it promises.

/// What each boot begins with.
const READY: &str = "counter guest ready ";

/// What a console says of the counting so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Counted {
    /// How often the guest booted.
    pub(crate) boots: usize,
    /// The last count of the last boot; 0 before the first.
    pub(crate) count: u32,
    /// The sum over its memory, the same in every line; empty before the first line.
    pub(crate) sum: String,
}

/// Reads a console of the counter guest from its beginning.
///
/// Each count is one higher than that before, from 1 after each boot, and each sum is
/// the same. Anything else is a guest that lost something, and fails the test.
#[track_caller]
pub(crate) fn counted(console: &str) -> Counted {
    let mut counted = Counted { boots: 0, count: 0, sum: String::new() };
    // What follows the last newline is a line that is being printed.
    let whole = console.rfind('\n').map_or("", |end| &console[..end]);
    for line in whole.lines() {
        // A VMM that is killed leaves a line unfinished, which the next boot goes on with.
        let line = line.find(READY).map_or(line, |boot| &line[boot..]);
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let sum = match words[..] {
            ["counter", "guest", "ready", "sum", sum] => {
                counted.boots += 1;
                counted.count = 0;
                sum
            }
            ["count", count, "sum", sum] => {
                let count = u32::from_str_radix(count, 16).unwrap();
                assert_eq!(count, counted.count + 1, "a gap or a repeat at `{line}`");
                counted.count = count;
                sum
            }
            ["counter", "guest", "quits"] | [] => continue,
            _ => panic!("the counter guest says `{line}`"),
        };
        assert!(counted.sum.is_empty() || counted.sum == sum, "its memory changed at `{line}`");
        sum.clone_into(&mut counted.sum);
    }
    counted
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    const BOOT: &str = "counter guest ready sum 0a\ncount 00000001 sum 0a\n";

    #[test]
    fn a_whole_console_is_read_up_to_its_last_whole_line() {
        let text = format!("{BOOT}count 00000002 sum 0a\n{BOOT}count 00000002 sum 0a\ncount 000");
        let want = Counted { boots: 2, count: 2, sum: "0a".to_owned() };
        assert_eq!(counted(&text), want);
        assert_eq!(counted("").boots, 0);
    }

    #[test]
    fn a_line_that_a_killed_vmm_left_unfinished_is_passed_over() {
        let text = format!("{BOOT}count 00000002 su{BOOT}");
        assert_eq!(counted(&text), Counted { boots: 2, count: 1, sum: "0a".to_owned() });
        let text = format!("{BOOT}count 00000002 sucount 00000003 sum 0a\n");
        assert!(catch_unwind(|| counted(&text)).is_err());
    }

    #[test]
    fn a_gap_a_repeat_and_another_sum_are_caught() {
        for bad in [
            "count 00000003 sum 0a\n",
            "count 00000001 sum 0a\n",
            "count 00000002 sum 0b\n",
            "counter guest torn\n",
        ] {
            let text = format!("{BOOT}{bad}");
            assert!(catch_unwind(|| counted(&text)).is_err(), "{bad}");
        }
    }
}
