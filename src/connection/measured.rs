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

/// Distributions, in the order of `Times`.
pub const KINDS: usize = 3;

/// Of one upstream.
#[derive(Debug)]
pub struct OfUpstream {
    /// Whose.
    pub life: Arc<UpstreamLife>,
    /// In the order of `Times`.
    pub times: [Buckets; KINDS],
    pool: usize,
}

/// Of one pool.
#[derive(Debug)]
pub struct OfPool {
    /// Whose.
    pub name: Arc<str>,
    /// In the order of `Times`.
    pub times: [Fine; KINDS],
}

/// Everything measured since the last time.
#[derive(Debug, Default)]
pub struct Measured {
    /// By the address of their life: it isn't freed while it stands here.
    upstreams: HashMap<usize, OfUpstream>,
    pools: Vec<OfPool>,
    /// Processor time of the worker's thread since it started.
    pub cpu: Duration,
}

impl Measured {
    /// Something is known of a connection to this upstream of this pool.
    pub fn record(&mut self, pool: &Arc<str>, life: &Arc<UpstreamLife>, times: Times) {
        let upstream = upstream(&mut self.upstreams, &mut self.pools, pool, life);
        let pool = &mut self.pools[upstream.pool];
        let all = [times.connect, times.first_byte, times.duration];
        for (index, duration) in all.into_iter().enumerate() {
            if let Some(duration) = duration {
                upstream.times[index].record(duration);
                pool.times[index].record(duration);
            }
        }
    }

    /// Takes back what nobody waited for.
    pub fn absorb(&mut self, other: &Measured) {
        for more in other.upstreams.values() {
            let pool = &other.pools[more.pool].name;
            let upstream = upstream(&mut self.upstreams, &mut self.pools, pool, &more.life);
            upstream.times.iter_mut().zip(&more.times).for_each(|(times, more)| times.merge(more));
        }
        for more in &other.pools {
            if let Some(pool) = self.pools.iter_mut().find(|pool| pool.name == more.name) {
                pool.times.iter_mut().zip(&more.times).for_each(|(times, more)| times.merge(more));
            }
        }
    }

    /// By upstream, each with the name of its pool.
    pub fn upstreams(&self) -> impl Iterator<Item = (&str, &OfUpstream)> {
        self.upstreams.values().map(|upstream| (&*self.pools[upstream.pool].name, upstream))
    }

    /// By pool.
    pub fn pools(&self) -> &[OfPool] {
        &self.pools
    }

    /// Forgets all, and keeps the memory of what is in use.
    pub fn clear(&mut self) {
        let is_used = |upstream: &OfUpstream| upstream.times.iter().any(|times| times.count() > 0);
        if !self.upstreams.values().all(is_used) {
            (self.upstreams, self.pools) = Default::default();
        }
        self.upstreams.values_mut().for_each(|upstream| upstream.times = Default::default());
        self.pools.iter_mut().flat_map(|pool| &mut pool.times).for_each(Fine::clear);
    }
}

fn upstream<'a>(
    upstreams: &'a mut HashMap<usize, OfUpstream>,
    pools: &mut Vec<OfPool>,
    pool: &Arc<str>,
    life: &Arc<UpstreamLife>,
) -> &'a mut OfUpstream {
    upstreams.entry(Arc::as_ptr(life).addr()).or_insert_with(|| {
        let known = pools.iter().position(|known| known.name == *pool);
        let index = known.unwrap_or_else(|| {
            pools.push(OfPool { name: Arc::clone(pool), times: Default::default() });
            pools.len() - 1
        });
        OfUpstream { life: Arc::clone(life), times: Default::default(), pool: index }
    })
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
        let expected = [("a", 1, [1, 0, 1]), ("a", 2, [1, 0, 1]), ("b", 3, [2, 0, 2])];
        assert_eq!(counts, expected.map(|(pool, port, counts)| (pool.to_owned(), port, counts)));
        measured.clear();
        assert!(measured.upstreams().all(|(_, upstream)| upstream.times[0].count() == 0));
        assert_eq!(measured.pools().len(), 2);
        measured.clear();
        assert!(measured.pools().is_empty(), "what was not used for an interval is let go");
        assert_eq!(Arc::strong_count(&lives[0]), 1);
    }
}
