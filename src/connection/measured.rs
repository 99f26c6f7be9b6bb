//! What one worker measured of its connections since it was last asked. Plain memory of that worker: it changes hands
//! as a whole.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::metrics::latency::{Buckets, Fine};
use crate::pool::UpstreamLife;

/// What is measured once for each connection that reached an upstream; each as soon as it is known, because a connection
/// may stay for days.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// The connect that succeeded.
    pub connect: Option<Duration>,
    /// From accept to the upstream's first byte, if there was one.
    pub first_byte: Option<Duration>,
    /// From accept to the end.
    pub duration: Option<Duration>,
}

/// From a UDP client's first datagram without a reply to the next reply.
pub const ROUND_TRIP: usize = 3;
/// From a UDP session's first datagram to its end.
pub const SESSION: usize = 4;
/// Distributions: in the order of `Times`, then `ROUND_TRIP` and `SESSION`.
pub const KINDS: usize = 5;

/// Of one upstream.
#[derive(Debug)]
pub struct OfUpstream {
    /// Whose.
    pub life: Arc<UpstreamLife>,
    /// By kind.
    pub times: [Buckets; KINDS],
    pool: usize,
}

/// Of one pool.
#[derive(Debug)]
pub struct OfPool {
    /// Whose.
    pub name: Arc<str>,
    /// By kind.
    pub times: [Fine; KINDS],
}

/// Everything measured since the last time.
#[derive(Debug, Default)]
pub struct Measured {
    upstreams: Vec<OfUpstream>,
    /// Where they stand, by the address of their life: it isn't freed while it stands there.
    places: HashMap<usize, usize>,
    pools: Vec<OfPool>,
    /// Processor time of the worker's thread since it started.
    pub cpu: Duration,
}

impl Measured {
    /// Something is known of a connection to this upstream of this pool.
    pub fn record(&mut self, pool: &Arc<str>, life: &Arc<UpstreamLife>, times: Times) {
        let place = self.place(pool, life);
        let all = [times.connect, times.first_byte, times.duration];
        for (kind, duration) in all.into_iter().enumerate() {
            if let Some(duration) = duration {
                self.record_at(place, kind, duration);
            }
        }
    }

    /// One duration of this kind. `place` is where the caller found this upstream the last time: with the right one, and
    /// it nearly always is, nothing is looked up.
    pub fn record_one(
        &mut self,
        place: &mut usize,
        pool: &Arc<str>,
        life: &Arc<UpstreamLife>,
        kind: usize,
        duration: Duration,
    ) {
        if self.upstreams.get(*place).is_none_or(|upstream| !Arc::ptr_eq(&upstream.life, life)) {
            *place = self.place(pool, life);
        }
        self.record_at(*place, kind, duration);
    }

    fn record_at(&mut self, place: usize, kind: usize, duration: Duration) {
        let upstream = &mut self.upstreams[place];
        upstream.times[kind].record(duration);
        self.pools[upstream.pool].times[kind].record(duration);
    }

    /// Takes back what nobody waited for.
    pub fn absorb(&mut self, other: &Measured) {
        for more in &other.upstreams {
            let place = self.place(&other.pools[more.pool].name, &more.life);
            self.upstreams[place].times.iter_mut().zip(&more.times).for_each(|(times, more)| times.merge(more));
        }
        for more in &other.pools {
            if let Some(pool) = self.pools.iter_mut().find(|pool| pool.name == more.name) {
                pool.times.iter_mut().zip(&more.times).for_each(|(times, more)| times.merge(more));
            }
        }
    }

    /// By upstream, each with the name of its pool.
    pub fn upstreams(&self) -> impl Iterator<Item = (&str, &OfUpstream)> {
        self.upstreams.iter().map(|upstream| (&*self.pools[upstream.pool].name, upstream))
    }

    /// By pool.
    pub fn pools(&self) -> &[OfPool] {
        &self.pools
    }

    /// Forgets all, and keeps the memory of what is in use.
    pub fn clear(&mut self) {
        let is_used = |upstream: &OfUpstream| upstream.times.iter().any(|times| times.count() > 0);
        if !self.upstreams.iter().all(is_used) {
            (self.upstreams, self.places, self.pools) = Default::default();
        }
        self.upstreams.iter_mut().for_each(|upstream| upstream.times = Default::default());
        self.pools.iter_mut().flat_map(|pool| &mut pool.times).for_each(Fine::clear);
    }

    /// Where this upstream stands; a new one behind the others.
    fn place(&mut self, pool: &Arc<str>, life: &Arc<UpstreamLife>) -> usize {
        let Measured { upstreams, places, pools, .. } = self;
        *places.entry(Arc::as_ptr(life).addr()).or_insert_with(|| {
            let known = pools.iter().position(|known| known.name == *pool);
            let pool = known.unwrap_or_else(|| {
                pools.push(OfPool { name: Arc::clone(pool), times: Default::default() });
                pools.len() - 1
            });
            upstreams.push(OfUpstream { life: Arc::clone(life), times: Default::default(), pool });
            upstreams.len() - 1
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    fn times(milliseconds: u64) -> Times {
        let duration = Some(Duration::from_millis(milliseconds));
        Times { connect: duration, first_byte: None, duration }
    }

    #[test]
    fn keeps_upstreams_and_pools_apart_and_forgets_when_cleared() {
        let lives: Vec<_> =
            (1..=3).map(|port| UpstreamLife::new(SocketAddr::from(([127, 0, 0, 1], port)).into())).collect();
        let (a, b): (Arc<str>, Arc<str>) = (Arc::from("a"), Arc::from("b"));
        let mut measured = Measured::default();
        measured.record(&a, &lives[0], times(1));
        measured.record(&a, &lives[1], times(2));
        measured.record(&b, &lives[2], times(3));
        let mut late = Measured::default();
        late.record(&b, &lives[2], times(4));
        measured.absorb(&late);
        let mut counts: Vec<_> = measured
            .upstreams()
            .map(|(pool, upstream)| {
                (pool.to_owned(), upstream.life.address.port().unwrap(), upstream.times.each_ref().map(Buckets::count))
            })
            .collect();
        counts.sort();
        let expected = [("a", 1, [1, 0, 1, 0, 0]), ("a", 2, [1, 0, 1, 0, 0]), ("b", 3, [2, 0, 2, 0, 0])];
        assert_eq!(counts, expected.map(|(pool, port, counts)| (pool.to_owned(), port, counts)));
        measured.clear();
        assert!(measured.upstreams().all(|(_, upstream)| upstream.times[0].count() == 0));
        assert_eq!(measured.pools().len(), 2);
        measured.clear();
        assert!(measured.pools().is_empty(), "what was not used for an interval is let go");
        assert_eq!(Arc::strong_count(&lives[0]), 1);
    }

    #[test]
    fn a_place_that_is_another_upstreams_is_not_believed() {
        let lives: Vec<_> =
            (1..=2).map(|port| UpstreamLife::new(std::net::SocketAddr::from(([127, 0, 0, 1], port)).into())).collect();
        let pool: Arc<str> = Arc::from("a");
        let mut measured = Measured::default();
        let mut places = [7, 0];
        for _ in 0..3 {
            for (place, life) in places.iter_mut().zip(&lives) {
                measured.record_one(place, &pool, life, ROUND_TRIP, Duration::from_millis(1));
            }
            // Nothing was used since the last time: the places are gone with what stood there.
            measured.clear();
            measured.clear();
            lives[..1].iter().for_each(|life| measured.record(&pool, life, times(1)));
        }
        places.swap(0, 1);
        for (place, life) in places.iter_mut().zip(&lives) {
            measured.record_one(place, &pool, life, SESSION, Duration::from_millis(1));
        }
        let counts: Vec<_> = measured.upstreams().map(|(_, one)| one.times.each_ref().map(Buckets::count)).collect();
        assert_eq!(counts, [[1, 0, 1, 0, 1], [0, 0, 0, 0, 1]]);
    }
}
