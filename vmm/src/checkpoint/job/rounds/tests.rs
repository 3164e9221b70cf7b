use super::*;

const PAGE: u64 = image::PAGE_SIZE;
const MS: Duration = Duration::from_millis(1);

/// The decisions after rounds that each leave this many pages. A round takes a microsecond for
/// each page.
fn follow(resume: bool, patient: bool, limit: Duration, pages: &[u64]) -> Vec<Next> {
    let mut rounds = Rounds { resume, patient, made: 0 };
    let each = pages.windows(2).map(|two| {
        let took = Duration::from_micros(two[0]);
        rounds.after(&Round { copied: two[0] * PAGE, took, left: two[1] * PAGE }, limit)
    });
    each.collect()
}

#[test]
fn rounds_are_made_while_they_get_shorter() {
    use Next::{Round, Stop};
    let limit = Duration::ZERO;
    assert_eq!(
        follow(true, false, limit, &[100_000, 10_000, 1_000, 740, 600]),
        [Round, Round, Round, Stop],
        "740 is less than 3/4 of 1,000, and 600 is more than that of 740"
    );
    assert_eq!(follow(true, false, limit, &[100_000, 65, 64]), [Round, Stop], "64 are few");
    assert_eq!(follow(false, true, limit, &[100_000, 0]), [Stop]);
}

#[test]
fn a_stream_waits_until_the_pause_is_short_enough_and_not_without_a_limit() {
    use Next::{Round, RoundInVain, Stop};
    // 40,000 pages take 40 ms.
    let pages = [100_000, 40_000, 40_000, 35_000, 30_000];
    assert_eq!(follow(false, true, 30 * MS, &pages), [Round, RoundInVain, RoundInVain, Stop]);
    assert_eq!(follow(false, false, 30 * MS, &pages[..3]), [Round, Stop], "a directory does not");
    let (always, each) = ([40_000; 31], follow(false, true, MS, &[40_000; 31]));
    assert_eq!(each.len(), always.len() - 1);
    assert!(each[..29].iter().all(|next| *next == RoundInVain) && each[29] == Stop);
}
