//! PURE. Has an upstream slowed? Its last connections against its siblings' of the same time and its own before.
//!
//! Both, because each alone is wrong often. A slow application, a busy hour, a slow database behind all: then its siblings
//! take as long. Another site, an older machine, or a sibling that is quick because it only says 500: then it always took
//! as long. And not the median alone: of few connections it is chance. So what counts is how many of the last ones took
//! clearly longer than is usual, and whether that can be chance.

/// Fewer connections than these say nothing, neither of an upstream nor of its siblings.
pub const SAMPLES_MIN: u64 = 20;

/// Where the last seconds brought fewer, this many intervals of five seconds are looked at.
pub const WINDOW_INTERVALS_MAX: usize = 6;

/// Slow is what takes this many times as long as usual, and `SLOW_BY_MS` longer.
pub const SLOW_FACTOR: f64 = 1.5;

/// See `SLOW_FACTOR`; milliseconds. Less is the scheduler's, or a garbage collector's.
pub const SLOW_BY_MS: f64 = 20.0;

/// Where nothing has changed, at most this share of connections is slow: half take longer than the median, and fewer than
/// these longer than one and a half times the median, even where times are spread evenly, by their logarithm, over 1 to 30.
const SHARE_BY_CHANCE: f64 = 0.4;

/// How far beyond that share, in standard deviations, chance is ruled out: of 20 connections 18 must be slow, of 100 63,
/// of a thousand half of them.
const DEVIATIONS: f64 = 4.5;

/// And never fewer than this share: the median itself is slow. As long as it is, an upstream stays accused.
const SHARE_MIN: f64 = 0.5;

/// How long connections took.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Half of them took no longer; milliseconds.
    pub median_ms: f64,
    /// Lower bounds in microseconds, ascending, each with how many took longer than it, up to the next one.
    pub counts: Vec<(u64, u64)>,
}

/// By how much an upstream has slowed; medians in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slow {
    /// Now, or when it was last seen.
    pub now_ms: f64,
    /// Its own, in the minute before.
    pub before_ms: f64,
    /// Its siblings', now.
    pub siblings_ms: f64,
}

impl Seen {
    /// How many.
    pub fn count(&self) -> u64 {
        self.counts.iter().map(|(_, count)| count).sum()
    }

    fn is_enough(&self) -> bool {
        self.count() >= SAMPLES_MIN
    }

    /// The share of them that is slow where `usual_ms` is usual.
    fn slow_share(&self, usual_ms: f64) -> f64 {
        let limit_ms = (usual_ms * SLOW_FACTOR).max(usual_ms + SLOW_BY_MS);
        let slow = self.counts.iter().filter(|(lower, _)| *lower as f64 / 1000.0 >= limit_ms);
        slow.map(|(_, count)| *count as f64).sum::<f64>() / self.count().max(1) as f64
    }
}

/// What is usual among the others. The lower one of two in the middle: where half of a pool has slowed, it has slowed.
fn usual(siblings: &[&Seen]) -> Option<f64> {
    let mut medians: Vec<f64> = siblings.iter().filter(|seen| seen.is_enough()).map(|seen| seen.median_ms).collect();
    medians.sort_by(f64::total_cmp);
    medians.get(medians.len().checked_sub(1)? / 2).copied()
}

/// Has it slowed? `None` also where nobody can know: too few connections, now or before, or no sibling to compare with.
pub fn has_slowed(recent: &Seen, before: &Seen, siblings: &[&Seen]) -> Option<Slow> {
    let siblings_ms = usual(siblings).filter(|_| recent.is_enough() && before.is_enough())?;
    let slow = Slow { now_ms: recent.median_ms, before_ms: before.median_ms, siblings_ms };
    let deviation = (SHARE_BY_CHANCE * (1.0 - SHARE_BY_CHANCE) / recent.count() as f64).sqrt();
    let share_min = (SHARE_BY_CHANCE + DEVIATIONS * deviation).max(SHARE_MIN);
    (recent.slow_share(before.median_ms.max(siblings_ms)) >= share_min).then_some(slow)
}

/// Is one that has slowed still slow? With its numbers of now. What it was before it slowed stays the measure, however long
/// it lasts; without connections for a minute nobody knows.
pub fn still_slow(slow: Slow, recent: &Seen, before: &Seen, siblings: &[&Seen]) -> Option<Slow> {
    if recent.count() + before.count() == 0 {
        return None;
    }
    if !recent.is_enough() {
        return Some(slow);
    }
    let siblings_ms = usual(siblings).unwrap_or(slow.siblings_ms);
    let is_slow = recent.slow_share(slow.before_ms.max(siblings_ms)) >= SHARE_MIN;
    is_slow.then_some(Slow { now_ms: recent.median_ms, siblings_ms, ..slow })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many connections of so many milliseconds each.
    fn seen(times: &[(u64, u64)]) -> Seen {
        let mut counts: Vec<(u64, u64)> = times.iter().map(|(ms, count)| (ms * 1000, *count)).collect();
        counts.sort_unstable();
        let half = counts.iter().map(|(_, count)| count).sum::<u64>().div_ceil(2);
        let mut sum = 0;
        let median = counts.iter().find(|(_, count)| {
            sum += count;
            sum >= half
        });
        Seen { median_ms: median.map_or(0.0, |(us, _)| *us as f64 / 1000.0), counts }
    }

    #[test]
    fn an_upstream_slowed_by_100_ms_is_told_from_its_siblings() {
        for usual_ms in [0, 1, 10, 50, 100, 180] {
            let usual = seen(&[(usual_ms, 30)]);
            let slow = seen(&[(usual_ms + 100, 30)]);
            let found = has_slowed(&slow, &usual, &[&usual, &usual]).expect("it has slowed");
            let as_ms = usual_ms as f64;
            assert_eq!(found, Slow { now_ms: as_ms + 100.0, before_ms: as_ms, siblings_ms: as_ms });
            assert_eq!(has_slowed(&usual, &usual, &[&usual, &slow]), None, "the others are as ever");
        }
    }

    #[test]
    fn what_is_not_its_own_fault_or_always_was_so_is_no_alarm() {
        let (fast, slow, few) = (seen(&[(1, 50)]), seen(&[(101, 50)]), seen(&[(101, 19)]));
        for (what, recent, before, siblings) in [
            ("all have slowed: the database behind them", &slow, &fast, vec![&slow, &slow]),
            ("a slow application", &slow, &slow, vec![&slow, &slow]),
            ("it was always slower: another site", &slow, &slow, vec![&fast, &fast]),
            ("a pool of one", &slow, &fast, vec![]),
            ("too few now", &few, &fast, vec![&fast, &fast]),
            ("it has only just come: a cold cache", &slow, &few, vec![&fast, &fast]),
            ("too few to compare with", &slow, &fast, vec![&few]),
            ("it is quicker than ever", &fast, &slow, vec![&slow, &slow]),
            ("slower, but nobody would notice", &seen(&[(19, 50)]), &fast, vec![&fast, &fast]),
            ("slower by a fifth", &seen(&[(120, 50)]), &seen(&[(100, 50)]), vec![&seen(&[(100, 50)])]),
        ] {
            assert_eq!(has_slowed(recent, before, &siblings), None, "{what}");
        }
    }

    #[test]
    fn of_few_connections_nearly_all_must_be_slow_and_of_many_half() {
        let usual = seen(&[(1, 100)]);
        for (count, slow_min) in [(20, 18), (40, 30), (100, 63), (1000, 500), (10_000, 5000)] {
            let of = |slow| has_slowed(&seen(&[(1, count - slow), (101, slow)]), &usual, &[&usual]);
            assert_eq!((of(slow_min - 1), of(slow_min).is_some()), (None, true), "{slow_min} of {count}");
        }
    }

    /// Where nothing has changed: 100 ms to 1 s, spread evenly by their logarithm, 20 of them at random, a hundred thousand
    /// times.
    #[test]
    fn chance_accuses_nobody() {
        let mut state = 88_172_645_463_325_252_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % 1_000_000) as f64 / 1_000_000.0
        };
        let mut draw = |count| {
            let times: Vec<(u64, u64)> = (0..count).map(|_| (10_f64.powf(2.0 + random()) as u64, 1)).collect();
            seen(&times)
        };
        let before = draw(2000);
        let accused = (0..100_000).filter(|_| has_slowed(&draw(20), &before, &[&before]).is_some()).count();
        assert_eq!(accused, 0);
    }

    #[test]
    fn where_half_of_a_pool_has_slowed_that_half_is_named() {
        let (fast, slow) = (seen(&[(1, 50)]), seen(&[(101, 50)]));
        assert!(has_slowed(&slow, &fast, &[&slow, &fast, &fast]).is_some());
        assert!(has_slowed(&slow, &fast, &[&fast, &slow]).is_some());
        assert_eq!(has_slowed(&slow, &fast, &[&slow, &slow, &fast]), None, "then it is rather the pool");
    }

    #[test]
    fn stays_accused_until_it_is_as_before_or_all_are_as_slow() {
        let (fast, slow, few) = (seen(&[(1, 50)]), seen(&[(101, 50)]), seen(&[(1, 5)]));
        let nothing = Seen::default();
        let accused = has_slowed(&slow, &fast, &[&fast]).expect("it has slowed");
        assert_eq!(still_slow(accused, &slow, &slow, &[&fast]), Some(accused), "a minute later, and for ever");
        assert_eq!(still_slow(accused, &few, &slow, &[&fast]), Some(accused), "too few say nothing else");
        assert_eq!(still_slow(accused, &fast, &slow, &[&fast]), None);
        assert_eq!(still_slow(accused, &slow, &slow, &[&slow]), None, "now it is the pool");
        assert_eq!(still_slow(accused, &nothing, &nothing, &[&fast]), None, "nobody knows");
        let slower = still_slow(accused, &seen(&[(400, 50)]), &slow, &[&fast]).expect("it is slow");
        assert_eq!((slower.now_ms, slower.before_ms), (400.0, 1.0));
    }
}
