//! Durations as their distribution: fixed buckets, cheap enough for each upstream, and fine histograms for each pool.

use std::collections::VecDeque;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use hdrhistogram::Histogram;

/// Upper bounds of the buckets that Prometheus gets, in microseconds; one more holds what is above.
const SHOWN_US: [u64; 20] = [
    100,
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    30_000_000,
    60_000_000,
    300_000_000,
    3_600_000_000,
];

/// Upper bounds of the buckets in microseconds: ten for each power of ten from 0.01 ms to 10 s, and all of `SHOWN_US`.
/// An upstream has twelve of such sets, 6.4 KiB; 0.9 of them tell times on one machine apart.
const BOUNDS_US: [u64; 65] = bounds();

const fn bounds() -> [u64; 65] {
    const TENTHS: [u64; 10] = [100, 125, 160, 200, 250, 315, 400, 500, 630, 800];
    const LONG: [u64; 5] = [10_000_000, 30_000_000, 60_000_000, 300_000_000, 3_600_000_000];
    let mut bounds = [0; 65];
    let mut index = 0;
    while index < 60 {
        bounds[index] = TENTHS[index % 10] * 10_u64.pow(index as u32 / 10) / 10;
        index += 1;
    }
    while index < 65 {
        bounds[index] = LONG[index - 60];
        index += 1;
    }
    bounds
}

/// The bounds shown for waits of the network: 0.1 ms to 10 s.
pub const WAITS: Range<usize> = 0..16;
/// The bounds shown for how long connections last: 1 ms to an hour.
pub const LIFETIMES: Range<usize> = 3..20;

/// Intervals that "the last minute" is made of.
const MINUTE_INTERVALS: usize = 12;

/// What is longer counts as this long; a histogram's size depends on it.
const LONGEST_US: u64 = 24 * 3600 * 1_000_000;

/// How durations are distributed; milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Percentiles {
    /// Durations measured.
    pub count: u64,
    /// Half of them took no longer.
    pub p50: f64,
    /// Of ten, nine took no longer.
    pub p90: f64,
    /// 99 %.
    pub p99: f64,
    /// 99.9 %.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

/// Durations by bucket, with their sum and the longest.
#[derive(Clone, Debug, PartialEq)]
pub struct Buckets {
    counts: [u64; BOUNDS_US.len() + 1],
    sum_us: u64,
    max_us: u64,
}

impl Default for Buckets {
    fn default() -> Buckets {
        Buckets { counts: [0; BOUNDS_US.len() + 1], sum_us: 0, max_us: 0 }
    }
}

fn micros(duration: Duration) -> u64 {
    (duration.as_micros() as u64).min(LONGEST_US)
}

/// Milliseconds, no finer than a microsecond.
fn milliseconds(us: u64) -> f64 {
    us as f64 / 1000.0
}

impl Buckets {
    /// Counts one.
    pub fn record(&mut self, duration: Duration) {
        let us = micros(duration);
        self.counts[BOUNDS_US.partition_point(|bound| *bound < us)] += 1;
        self.sum_us += us;
        self.max_us = self.max_us.max(us);
    }

    /// Adds what another one counted.
    pub fn merge(&mut self, other: &Buckets) {
        self.counts.iter_mut().zip(other.counts).for_each(|(count, more)| *count += more);
        self.sum_us += other.sum_us;
        self.max_us = self.max_us.max(other.max_us);
    }

    /// Durations counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Of all durations, in seconds.
    pub fn sum_seconds(&self) -> f64 {
        self.sum_us as f64 / 1e6
    }

    /// Upper bounds in seconds, each with the count of what took no longer.
    pub fn cumulative(&self, shown: Range<usize>) -> impl Iterator<Item = (f64, u64)> {
        let mut total = 0;
        let mut sums = BOUNDS_US.iter().zip(self.counts).map(move |(bound, count)| {
            total += count;
            (*bound, total)
        });
        SHOWN_US[shown].iter().map(move |shown| {
            let (_, total) = sums.find(|(bound, _)| bound == shown).expect("what is shown is a bound");
            (*shown as f64 / 1e6, total)
        })
    }

    /// Lower bounds in microseconds, ascending, each with how many took longer, and no longer than the next bound; those
    /// that there were.
    pub fn counts(&self) -> Vec<(u64, u64)> {
        let lower = std::iter::once(0).chain(BOUNDS_US);
        lower.zip(self.counts).filter(|(_, count)| *count > 0).collect()
    }

    /// `None` if nothing was counted. Between the bounds of a bucket durations are taken to be spread evenly.
    pub fn percentiles(&self) -> Option<Percentiles> {
        let count = self.count();
        let at = |share: f64| milliseconds(self.at(share, count));
        (count > 0).then(|| Percentiles {
            count,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: milliseconds(self.max_us),
        })
    }

    fn at(&self, share: f64, total: u64) -> u64 {
        let rank = ((share * total as f64).ceil() as u64).max(1);
        let mut below = 0;
        for (index, count) in self.counts.iter().enumerate() {
            if below + count >= rank {
                let lower = if index == 0 { 0 } else { BOUNDS_US[index - 1] };
                let upper = BOUNDS_US.get(index).map_or(self.max_us, |bound| self.max_us.min(*bound));
                let part = (rank - below) as f64 / *count as f64;
                return lower + ((upper.saturating_sub(lower)) as f64 * part) as u64;
            }
            below += count;
        }
        self.max_us
    }
}

/// Durations of one pool that one worker measured: to two figures.
#[derive(Clone, Debug)]
pub struct Fine(Histogram<u32>);

impl Default for Fine {
    fn default() -> Fine {
        Fine(Histogram::new(2).expect("two figures are allowed"))
    }
}

impl Fine {
    /// Counts one.
    pub fn record(&mut self, duration: Duration) {
        // It grows as far as it has to.
        let _ = self.0.record(micros(duration).max(1));
    }

    /// Adds what another one counted.
    pub fn merge(&mut self, other: &Fine) {
        let _ = self.0.add(&other.0);
    }

    /// Has it counted nothing?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets all, and keeps its memory.
    pub fn clear(&mut self) {
        self.0.reset();
    }
}

fn percentiles<C: hdrhistogram::Counter>(histogram: &Histogram<C>) -> Option<Percentiles> {
    let at = |share| milliseconds(histogram.value_at_quantile(share).min(histogram.max()));
    (!histogram.is_empty()).then(|| Percentiles {
        count: histogram.len(),
        p50: at(0.5),
        p90: at(0.9),
        p99: at(0.99),
        p999: at(0.999),
        max: milliseconds(histogram.max()),
    })
}

/// The buckets of an interval that is over: only what was seen, because most are empty.
#[derive(Clone, Debug)]
struct Closed {
    /// By the index of the bucket.
    counts: Vec<(u8, u32)>,
    sum_us: u64,
    max_us: u64,
}

impl Closed {
    fn new(buckets: &Buckets) -> Closed {
        let seen = buckets.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        let counts = seen.map(|(index, count)| (index as u8, u32::try_from(*count).unwrap_or(u32::MAX))).collect();
        Closed { counts, sum_us: buckets.sum_us, max_us: buckets.max_us }
    }

    fn add_to(&self, sum: &mut Buckets) {
        self.counts.iter().for_each(|(index, count)| sum.counts[usize::from(*index)] += u64::from(*count));
        sum.sum_us += self.sum_us;
        sum.max_us = sum.max_us.max(self.max_us);
    }
}

/// Durations by time, coarse: this interval, the last minute, and since the start.
#[derive(Clone, Debug, Default)]
pub struct CoarseTrack {
    interval: Buckets,
    minute: VecDeque<Closed>,
    total: Buckets,
}

impl CoarseTrack {
    /// Adds what was measured since the last time.
    pub fn add(&mut self, measured: &Buckets) {
        self.interval.merge(measured);
        self.total.merge(measured);
    }

    /// Ends an interval, and says what it was.
    pub fn close(&mut self) -> Option<Percentiles> {
        let interval = std::mem::take(&mut self.interval);
        let percentiles = interval.percentiles();
        self.minute.push_back(Closed::new(&interval));
        if self.minute.len() > MINUTE_INTERVALS {
            self.minute.pop_front();
        }
        percentiles
    }

    /// Of the last minute, and of the interval that has begun.
    pub fn last_minute(&self) -> Option<Percentiles> {
        self.recent(self.minute.len())[0].percentiles()
    }

    /// How many closed intervals make up so many durations together with the one that has begun.
    pub fn closed_for(&self, count: u64, closed: RangeInclusive<usize>) -> usize {
        let (fewest, most) = closed.into_inner();
        let mut sum = self.interval.count();
        for (age, interval) in self.minute.iter().rev().enumerate() {
            if age >= most || age >= fewest && sum >= count {
                return age;
            }
            sum += interval.counts.iter().map(|(_, count)| u64::from(*count)).sum::<u64>();
        }
        self.minute.len()
    }

    /// The interval that has begun with so many closed ones before it; and what was before those, in the last minute.
    pub fn recent(&self, closed: usize) -> [Buckets; 2] {
        let (mut recent, mut before) = (self.interval.clone(), Buckets::default());
        for (age, interval) in self.minute.iter().rev().enumerate() {
            interval.add_to(if age < closed { &mut recent } else { &mut before });
        }
        [recent, before]
    }

    /// Of all that was ever added.
    pub fn total(&self) -> &Buckets {
        &self.total
    }
}

/// Durations by time, to two figures.
#[derive(Clone, Debug)]
pub struct FineTrack {
    interval: Fine,
    /// Only what was seen, because a busy histogram is mostly zeros: microseconds and how often.
    minute: VecDeque<Vec<(u64, u32)>>,
    total: Histogram<u64>,
}

impl Default for FineTrack {
    fn default() -> FineTrack {
        let total = Histogram::new(2).expect("two figures are allowed");
        FineTrack { interval: Fine::default(), minute: VecDeque::new(), total }
    }
}

impl FineTrack {
    /// Adds what was measured since the last time.
    pub fn add(&mut self, measured: &Fine) {
        self.interval.merge(measured);
        for value in measured.0.iter_recorded() {
            let _ = self.total.record_n(value.value_iterated_to(), u64::from(value.count_at_value()));
        }
    }

    /// Ends an interval, and says what it was.
    pub fn close(&mut self) -> Option<Percentiles> {
        let seen = self.interval.0.iter_recorded().map(|value| (value.value_iterated_to(), value.count_at_value()));
        self.minute.push_back(seen.collect());
        if self.minute.len() > MINUTE_INTERVALS {
            self.minute.pop_front();
        }
        let percentiles = percentiles(&self.interval.0);
        self.interval.clear();
        percentiles
    }

    /// Of the last minute, and of the interval that has begun.
    pub fn last_minute(&self) -> Option<Percentiles> {
        let mut sum = self.interval.0.clone();
        for (value, count) in self.minute.iter().flatten() {
            let _ = sum.record_n(*value, *count);
        }
        percentiles(&sum)
    }

    /// Of all that was ever added.
    pub fn since_start(&self) -> Option<Percentiles> {
        percentiles(&self.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_duration_counts_up_to_its_bound() {
        let mut buckets = Buckets::default();
        for duration in
            [Duration::ZERO, Duration::from_micros(100), Duration::from_micros(101), ms(10_001), ms(1 << 60)]
        {
            buckets.record(duration);
        }
        assert_eq!(buckets.count(), 5);
        let waits: Vec<(f64, u64)> = buckets.cumulative(WAITS).collect();
        assert_eq!(waits[..3], [(0.0001, 2), (0.00025, 3), (0.0005, 3)]);
        assert_eq!(waits.last(), Some(&(10.0, 3)));
        assert_eq!(buckets.cumulative(LIFETIMES).next(), Some((0.001, 3)));
        assert_eq!(buckets.cumulative(LIFETIMES).last(), Some((3600.0, 4)), "a day and more is above all bounds");
    }

    #[test]
    fn what_is_shown_is_among_the_bounds_and_they_ascend() {
        assert!(BOUNDS_US.windows(2).all(|pair| pair[0] < pair[1]), "{BOUNDS_US:?}");
        assert!(SHOWN_US.iter().all(|shown| BOUNDS_US.contains(shown)));
        assert_eq!((BOUNDS_US[0], BOUNDS_US[10], BOUNDS_US[20], BOUNDS_US[59]), (10, 100, 1_000, 8_000_000));
        assert_eq!(12 * size_of::<Buckets>(), 6_528, "of one upstream: interval and total of each kind, and of checks");
    }

    #[test]
    fn what_is_recent_and_what_was_before_are_told_apart() {
        let mut track = CoarseTrack::default();
        for milliseconds in [1, 20, 300] {
            let mut one = Buckets::default();
            one.record(ms(milliseconds));
            track.add(&one);
            if milliseconds < 300 {
                track.close();
            }
        }
        let seen = |closed| {
            let [recent, before] = track.recent(closed);
            (recent.counts(), before.counts())
        };
        assert_eq!(seen(0), (vec![(250_000, 1)], vec![(800, 1), (16_000, 1)]));
        assert_eq!(seen(1), (vec![(16_000, 1), (250_000, 1)], vec![(800, 1)]));
        assert_eq!(seen(9), (vec![(800, 1), (16_000, 1), (250_000, 1)], vec![]));
        let closed = [(1, 0..=6), (2, 0..=6), (1, 1..=6), (9, 0..=6), (9, 0..=1)];
        assert_eq!(closed.map(|(count, range)| track.closed_for(count, range)), [0, 1, 1, 2, 1]);
    }

    #[test]
    fn buckets_and_histograms_agree_about_percentiles() {
        let (mut buckets, mut fine) = (Buckets::default(), Fine::default());
        for millisecond in 1..=1000 {
            buckets.record(ms(millisecond));
            fine.record(ms(millisecond));
        }
        let coarse = buckets.percentiles().unwrap();
        let fine = percentiles(&fine.0).unwrap();
        for (name, coarse, fine, exact) in [
            ("p50", coarse.p50, fine.p50, 500.0),
            ("p90", coarse.p90, fine.p90, 900.0),
            ("p99", coarse.p99, fine.p99, 990.0),
            ("p999", coarse.p999, fine.p999, 999.0),
            ("max", coarse.max, fine.max, 1000.0),
        ] {
            assert!((fine - exact).abs() <= exact / 100.0, "{name}: {fine}");
            assert!((coarse - exact).abs() <= exact / 50.0, "{name}: {coarse}");
        }
        assert_eq!((coarse.count, fine.count), (1000, 1000));
        assert_eq!(Buckets::default().percentiles(), None);
    }

    /// The same samples of one upstream and of its pool, which stand side by side on the page.
    #[test]
    fn an_upstream_and_a_pool_differ_by_less_than_a_bucket_from_a_hundredth_of_a_millisecond_on() {
        let us = |shortest: u64, share: u64| Duration::from_micros(shortest + shortest * share / 1000);
        for shortest in [10, 29, 70, 100, 1_000, 30_000, 4_000_000] {
            let (mut buckets, mut fine) = (Buckets::default(), Fine::default());
            for share in 0..1000 {
                buckets.record(us(shortest, share));
                fine.record(us(shortest, share));
            }
            let (coarse, fine) = (buckets.percentiles().unwrap(), percentiles(&fine.0).unwrap());
            for (coarse, fine) in [(coarse.p50, fine.p50), (coarse.p99, fine.p99), (coarse.p999, fine.p999)] {
                assert!((coarse / fine - 1.0).abs() < 0.1, "from {shortest} us: {coarse} beside {fine}");
            }
        }
        let (mut buckets, mut fine) = (Buckets::default(), Fine::default());
        (0..100).for_each(|_| {
            buckets.record(Duration::from_micros(29));
            fine.record(Duration::from_micros(29));
        });
        let (coarse, fine) = (buckets.percentiles().unwrap().p50, percentiles(&fine.0).unwrap().p50);
        assert!((coarse / fine - 1.0).abs() < 0.26, "{coarse} beside {fine}");
    }

    #[test]
    fn a_minute_forgets_and_the_total_does_not() {
        let (mut coarse, mut fine) = (CoarseTrack::default(), FineTrack::default());
        let (mut slow, mut slow_fine) = (Buckets::default(), Fine::default());
        slow.record(ms(900));
        slow_fine.record(ms(900));
        coarse.add(&slow);
        fine.add(&slow_fine);
        assert_eq!(coarse.last_minute().unwrap().count, 1, "the interval that has begun counts");
        assert_eq!(fine.close().unwrap().count, 1);
        assert_eq!(coarse.close().unwrap().count, 1);
        for _ in 1..MINUTE_INTERVALS {
            assert_eq!((coarse.close(), fine.close()), (None, None));
        }
        assert_eq!(coarse.last_minute().unwrap().max, 900.0);
        assert_eq!(fine.last_minute().unwrap().count, 1);
        coarse.close();
        fine.close();
        assert_eq!((coarse.last_minute(), fine.last_minute()), (None, None));
        assert_eq!((coarse.total().count(), fine.since_start().unwrap().count), (1, 1));
    }
}
