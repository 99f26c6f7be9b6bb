//! Upstreams and how to choose among them: what outlives a reload, what does not, and the tables that a pick walks.

pub mod balance;
pub mod header;
pub mod life;
pub mod rejection;
pub mod source_hash;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::address::Address;
use crate::config::{self, Balance};
use balance::Candidate;
pub use life::{Lease, UpstreamLife};
use source_hash::{ClientHash, LOOKS_MAX, Member, Table, Tables};

/// What checks observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Not checked yet.
    Unknown,
    /// Takes traffic.
    Healthy,
    /// Does not.
    Unhealthy,
}

impl Health {
    /// The word in logs, metrics and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Health::Unknown => "unknown",
            Health::Healthy => "healthy",
            Health::Unhealthy => "unhealthy",
        }
    }
}

/// What the operator ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdminState {
    /// As configured.
    Enabled,
    /// Nothing new; open connections stay.
    Draining,
    /// Nothing new; open connections are reset.
    Disabled,
}

impl AdminState {
    /// The word in logs, metrics and status.
    pub fn as_str(self) -> &'static str {
        match self {
            AdminState::Enabled => "enabled",
            AdminState::Draining => "draining",
            AdminState::Disabled => "disabled",
        }
    }
}

/// The name under which life, health and admin state are kept.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UpstreamKey {
    /// Name of the pool.
    pub pool: String,
    /// Address of the upstream.
    pub address: Address,
}

impl fmt::Display for UpstreamKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pool, self.address)
    }
}

/// A change of health that a checker decided on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Which upstream.
    pub key: UpstreamKey,
    /// What it is now.
    pub health: Health,
    /// "connected in 1 ms", "connection refused", "status 503, expected 200-399" ...
    pub reason: String,
}

/// One upstream as one snapshot sees it.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// What is shared with other snapshots.
    pub life: Arc<UpstreamLife>,
    /// Index in the configured pool's `upstreams`.
    pub entry: usize,
    /// 0: no limit.
    pub connections_max: u32,
    /// What the rules look at.
    pub candidate: Candidate,
    /// How far a slow start has come, of `SLOW_START_STEPS`.
    pub slow_start_step: u32,
}

/// A pool as one snapshot sees it. A pool with upstreams that take the listener's port stands here once for each port.
#[derive(Debug)]
pub struct Pool {
    /// The pool's name.
    pub name: Arc<str>,
    /// The configuration in force.
    pub config: Arc<config::Pool>,
    /// Every upstream, usable or not, in file order.
    pub upstreams: Vec<Upstream>,
    /// Where round robin stands, and the start of scans; carried over from snapshot to snapshot.
    pub turn: Arc<AtomicUsize>,
    tiers: Vec<Tier>,
}

/// Upstreams that are tried before those of the next tier.
#[derive(Debug)]
struct Tier {
    /// Index in `Pool::upstreams` and effective weight.
    members: Vec<(u16, u32)>,
    /// Round robin's order, by index in `members`.
    order: Vec<u16>,
    weight_sum: u64,
    sources: Option<Sources>,
}

/// What `source_hash` needs of a tier.
#[derive(Debug)]
struct Sources {
    table: Arc<Table>,
    /// As many as the table's members: index in `Tier::members`, and how many of its clients that one takes, of
    /// `SLOW_START_STEPS`. `None`: it takes no connections.
    places: Vec<Option<(u16, u32)>>,
}

/// Why there is nobody to connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PickError {
    /// No upstream takes connections.
    None,
    /// Those that do are at their `max_connections`.
    Full,
    /// Those with room were tried already.
    Tried,
}

/// An upstream to connect to.
#[derive(Debug)]
pub struct Picked {
    /// Index in `Pool::upstreams`.
    pub index: usize,
    /// Its place among the open connections.
    pub lease: Lease,
}

/// Rescans of least connections before it takes what it found: others keep changing the counts.
const RESCANS_MAX: usize = 16;

impl Pool {
    /// Lays out the tables for these upstreams; `known` ones are used again.
    pub fn new(
        config: Arc<config::Pool>,
        upstreams: Vec<Upstream>,
        turn: Arc<AtomicUsize>,
        known: &mut Tables,
    ) -> Pool {
        let candidates: Vec<Candidate> = upstreams.iter().map(|upstream| upstream.candidate).collect();
        let tiers = balance::tiers(&candidates, config.when_none_healthy)
            .into_iter()
            .map(|members| Tier::new(&members, &upstreams, &config, known))
            .collect();
        Pool { name: Arc::from(config.name.as_str()), config, upstreams, turn, tiers }
    }

    /// Does any upstream take new connections?
    pub fn is_usable(&self) -> bool {
        !self.tiers.is_empty()
    }

    /// How many upstreams a pick may choose from, later tiers included.
    pub fn usable(&self) -> usize {
        self.tiers.iter().map(|tier| tier.members.len()).sum()
    }

    /// Does this upstream take new connections?
    pub fn takes(&self, index: usize) -> bool {
        self.tiers.iter().any(|tier| tier.members.iter().any(|(member, _)| usize::from(*member) == index))
    }

    /// The next upstream that has room and is not in `tried`, for this client. `None`: it has no address.
    pub fn pick(&self, client: Option<IpAddr>, tried: &[usize]) -> Result<Picked, PickError> {
        // One step a pick, however many tiers it falls through: else the later ones would see every second turn only.
        let turn = match self.config.balance {
            Balance::SourceHash => 0,
            _ => self.turn.fetch_add(1, Ordering::Relaxed),
        };
        let mut outcome = PickError::None;
        for tier in &self.tiers {
            let picked = match self.config.balance {
                Balance::RoundRobin => self.pick_in_turn(tier, tried, turn),
                Balance::LeastConnections => self.pick_least(tier, tried, turn),
                Balance::RandomTwo => self.pick_of_two(tier, tried),
                Balance::SourceHash => self.pick_by_source(tier, tried, client),
            };
            match picked {
                Ok(picked) => return Ok(picked),
                // "Tried" says more than "full": trying again may help.
                Err(error) if outcome != PickError::Tried => outcome = error,
                Err(_) => {}
            }
        }
        Err(outcome)
    }

    fn pick_in_turn(&self, tier: &Tier, tried: &[usize], start: usize) -> Result<Picked, PickError> {
        self.first_with_room(
            tier,
            tried,
            (0..tier.order.len()).map(|offset| usize::from(tier.order[start.wrapping_add(offset) % tier.order.len()])),
        )
    }

    fn pick_least(&self, tier: &Tier, tried: &[usize], start: usize) -> Result<Picked, PickError> {
        for _ in 0..RESCANS_MAX {
            let mut outcome = PickError::Full;
            let mut best: Option<(usize, (u32, u32))> = None;
            for offset in 0..tier.members.len() {
                let (index, weight) = tier.members[start.wrapping_add(offset) % tier.members.len()];
                let upstream = &self.upstreams[usize::from(index)];
                if tried.contains(&usize::from(index)) {
                    outcome = PickError::Tried;
                    continue;
                }
                let load = (upstream.life.open(), weight);
                let has_room = upstream.connections_max == 0 || load.0 < upstream.connections_max;
                if has_room && best.is_none_or(|(_, least)| balance::less_loaded(load, least)) {
                    best = Some((usize::from(index), load));
                }
            }
            let Some((index, (open, _))) = best else { return Err(outcome) };
            if let Some(lease) = self.upstreams[index].life.lease_if(open) {
                return Ok(Picked { index, lease });
            }
        }
        self.pick_in_order(tier, tried)
    }

    fn pick_of_two(&self, tier: &Tier, tried: &[usize]) -> Result<Picked, PickError> {
        let draw = || {
            let member = balance::weighted_index(
                tier.members.iter().map(|(_, weight)| *weight),
                fastrand::u64(0..tier.weight_sum),
            );
            tier.members[member]
        };
        let (first, mut second) = (draw(), draw());
        if first == second && tier.members.len() > 1 {
            let position = tier.members.iter().position(|member| *member == first).unwrap_or(0);
            let step = fastrand::usize(1..tier.members.len());
            second = tier.members[(position + step) % tier.members.len()];
        }
        // What is drawn twice counts by connections alone: its weight is already in the draw.
        let load = |(index, _): (u16, u32)| self.upstreams[usize::from(index)].life.open();
        let order = if load(second) < load(first) { [second, first] } else { [first, second] };
        for (index, _) in order {
            if let Some(picked) = self.lease(usize::from(index), tried) {
                return Ok(picked);
            }
        }
        self.pick_in_order(tier, tried)
    }

    fn pick_by_source(&self, tier: &Tier, tried: &[usize], client: Option<IpAddr>) -> Result<Picked, PickError> {
        let Some(Sources { table, places }) = &tier.sources else { return Err(PickError::None) };
        let client = ClientHash::of(client);
        for slot in client.order().take(LOOKS_MAX) {
            if let Some((member, share)) = places[table.owner(slot)]
                && client.is_among(share)
                && let Some(picked) = self.lease(usize::from(tier.members[usize::from(member)].0), tried)
            {
                return Ok(picked);
            }
        }
        // Those with room own a few of the slots only. Still the same order on every replica: by name.
        let (before, from) = places.split_at(client.start(places.len()));
        self.first_with_room(tier, tried, from.iter().chain(before).flatten().map(|(member, _)| usize::from(*member)))
    }

    /// The first of the tier that has room, from a random start: when the policy's own choice had none.
    fn pick_in_order(&self, tier: &Tier, tried: &[usize]) -> Result<Picked, PickError> {
        let start = fastrand::usize(0..tier.members.len());
        self.first_with_room(tier, tried, (0..tier.members.len()).map(|offset| (start + offset) % tier.members.len()))
    }

    fn first_with_room(
        &self,
        tier: &Tier,
        tried: &[usize],
        members: impl Iterator<Item = usize>,
    ) -> Result<Picked, PickError> {
        let mut outcome = PickError::Full;
        for member in members {
            let index = usize::from(tier.members[member].0);
            match self.lease(index, tried) {
                Some(picked) => return Ok(picked),
                None if tried.contains(&index) => outcome = PickError::Tried,
                None => {}
            }
        }
        Err(outcome)
    }

    fn lease(&self, index: usize, tried: &[usize]) -> Option<Picked> {
        if tried.contains(&index) {
            return None;
        }
        let upstream = &self.upstreams[index];
        let lease = upstream.life.lease(upstream.connections_max)?;
        Some(Picked { index, lease })
    }
}

impl Tier {
    fn new(members: &[usize], upstreams: &[Upstream], config: &config::Pool, known: &mut Tables) -> Tier {
        let weights: Vec<u32> = members.iter().map(|index| upstreams[*index].candidate.weight).collect();
        let steps: Vec<u32> = members.iter().map(|index| upstreams[*index].slow_start_step).collect();
        let weights = balance::effective_weights(&weights, &steps);
        let order = if config.balance == Balance::RoundRobin { balance::lay_out(&weights) } else { Vec::new() };
        let weight_sum = weights.iter().copied().map(u64::from).sum();
        let sources = match config.balance {
            Balance::SourceHash => Some(Sources::new(members, &source_hash::shares(&steps), upstreams, config, known)),
            _ => None,
        };
        Tier { members: members.iter().map(|index| *index as u16).zip(weights).collect(), order, weight_sum, sources }
    }
}

impl Sources {
    /// The table is one of all upstreams that may ever be in this tier: whether they are does not change it.
    fn new(
        members: &[usize],
        shares: &[u32],
        upstreams: &[Upstream],
        config: &config::Pool,
        known: &mut Tables,
    ) -> Sources {
        let name = |upstream: &Upstream| {
            let address = &upstream.life.address;
            match address.ip().filter(|_| config.upstreams[upstream.entry].address.takes_port()) {
                Some(without_port) => without_port.ip().to_string(),
                None => address.to_string(),
            }
        };
        let has = |backup: bool| members.iter().any(|index| upstreams[*index].candidate.backup == backup);
        let may_join = |upstream: &&Upstream| upstream.candidate.weight > 0 && has(upstream.candidate.backup);
        let member = |upstream: &Upstream| Member { name: name(upstream), weight: upstream.candidate.weight };
        let table = known.of(upstreams.iter().filter(may_join).map(member).collect());
        let mut places = vec![None; table.members().len()];
        for (position, (index, share)) in members.iter().zip(shares).enumerate() {
            let place = table.members().binary_search(&member(&upstreams[*index]));
            places[place.expect("who is in a tier is in its table")] = Some((position as u16, *share));
        }
        Sources { table, places }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// A pool of upstreams with these weights and limits, all healthy.
    fn pool(balance: &str, upstreams: &[(u32, u32)]) -> Pool {
        let mut text = format!("[listeners.a]\nbind = \":80\"\npool = \"p\"\n[pools.p]\nbalance = \"{balance}\"\n");
        for (index, (weight, _)) in upstreams.iter().enumerate() {
            text += &format!("[[pools.p.upstreams]]\naddress = \"127.0.0.1:{}\"\nweight = {weight}\n", index + 1);
        }
        let config = config::parse("test.toml", &text).unwrap().config;
        let config = Arc::clone(&config.pools["p"]);
        let upstreams = upstreams.iter().enumerate().map(|(entry, (weight, limit))| Upstream {
            life: UpstreamLife::new(config.upstreams[entry].address.at(None).expect("an address")),
            entry,
            connections_max: *limit,
            candidate: Candidate {
                health: Health::Healthy,
                admin: AdminState::Enabled,
                weight: *weight,
                backup: false,
            },
            slow_start_step: balance::SLOW_START_STEPS,
        });
        Pool::new(Arc::clone(&config), upstreams.collect(), Arc::default(), &mut Tables::default())
    }

    fn held(pool: &Pool) -> Vec<u32> {
        pool.upstreams.iter().map(|upstream| upstream.life.open()).collect()
    }

    /// The same pool as `of` with something changed.
    fn changed(of: &Pool, change: impl FnOnce(&mut [Upstream])) -> Pool {
        let mut upstreams = of.upstreams.clone();
        change(&mut upstreams);
        Pool::new(Arc::clone(&of.config), upstreams, Arc::default(), &mut Tables::default())
    }

    fn client(index: u32) -> Option<IpAddr> {
        Some(IpAddr::from((0x0A00_0000 + index).to_be_bytes()))
    }

    /// Where each of many clients goes.
    fn upstreams_of_clients(pool: &Pool) -> Vec<usize> {
        (0..2_000).map(|index| pool.pick(client(index), &[]).unwrap().index).collect()
    }

    #[test]
    fn round_robin_is_exact_over_all_threads() {
        let pool = pool("round_robin", &[(3, 0), (1, 0), (2, 0)]);
        let leases: Vec<Lease> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..6)
                .map(|_| scope.spawn(|| (0..100).map(|_| pool.pick(None, &[]).unwrap().lease).collect::<Vec<_>>()))
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(held(&pool), [300, 100, 200]);
        drop(leases);
        assert_eq!(held(&pool), [0, 0, 0]);
    }

    #[test]
    fn least_connections_is_exact_over_all_threads() {
        let pool = pool("least_connections", &[(2, 0), (1, 0), (1, 0)]);
        let leases: Vec<Lease> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..100).map(|_| pool.pick(None, &[]).unwrap().lease).collect::<Vec<_>>()))
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let open = held(&pool);
        assert_eq!(open.iter().sum::<u32>(), 400);
        for (count, expected) in open.iter().zip([200, 100, 100]) {
            // A scan under way may see a count that another thread is just raising.
            assert!(count.abs_diff(expected) <= 4, "{open:?}");
        }
        drop(leases);
    }

    #[test]
    fn least_connections_goes_where_there_is_least() {
        let pool = pool("least_connections", &[(1, 0), (1, 0)]);
        let first = pool.pick(None, &[]).unwrap();
        let second = pool.pick(None, &[]).unwrap();
        assert_ne!(first.index, second.index);
        drop(first.lease);
        for _ in 0..5 {
            assert_ne!(pool.pick(None, &[]).unwrap().index, second.index);
        }
    }

    #[test]
    fn a_limit_is_never_passed_and_says_full() {
        for balance in ["round_robin", "least_connections", "random_two", "source_hash"] {
            let pool = pool(balance, &[(1, 2), (5, 3)]);
            let mut leases: Vec<Picked> = (0..5).map(|_| pool.pick(None, &[]).unwrap()).collect();
            assert_eq!(held(&pool), [2, 3], "{balance}");
            assert_eq!(pool.pick(None, &[]).unwrap_err(), PickError::Full, "{balance}");
            let freed = leases.pop().unwrap().index;
            assert_eq!(pool.pick(None, &[]).unwrap().index, freed, "{balance}");
        }
    }

    #[test]
    fn what_was_tried_is_not_picked_again() {
        for balance in ["round_robin", "least_connections", "random_two", "source_hash"] {
            let pool = pool(balance, &[(1, 0), (9, 0), (1, 0)]);
            for _ in 0..50 {
                assert_eq!(pool.pick(None, &[0, 1]).unwrap().index, 2, "{balance}");
            }
            assert_eq!(pool.pick(None, &[0, 1, 2]).unwrap_err(), PickError::Tried, "{balance}");
        }
    }

    #[test]
    fn an_overflow_reaches_every_backup() {
        for balance in ["round_robin", "least_connections"] {
            let mut upstreams = pool(balance, &[(1, 1), (1, 0), (1, 0)]);
            let mut members = std::mem::take(&mut upstreams.upstreams);
            members[1].candidate.backup = true;
            members[2].candidate.backup = true;
            let pool = Pool::new(Arc::clone(&upstreams.config), members, Arc::default(), &mut Tables::default());
            let first = pool.pick(None, &[]).unwrap();
            assert_eq!(first.index, 0, "{balance}");
            let mut counts = [0; 3];
            for _ in 0..40 {
                counts[pool.pick(None, &[]).unwrap().index] += 1;
            }
            assert_eq!(counts, [0, 20, 20], "{balance}");
        }
    }

    #[test]
    fn random_two_prefers_the_less_loaded_and_reaches_everyone() {
        let pool = pool("random_two", &[(1, 0), (1, 0), (1, 0)]);
        let leases: Vec<Picked> = (0..300).map(|_| pool.pick(None, &[]).unwrap()).collect();
        let mut counts: HashMap<usize, usize> = HashMap::new();
        leases.iter().for_each(|picked| *counts.entry(picked.index).or_default() += 1);
        // Two choices keep the difference small: at random alone it would be about 15.
        assert!(counts.values().all(|count| (90..=110).contains(count)), "{counts:?}");
    }

    #[test]
    fn source_hash_keeps_a_client_and_gives_each_upstream_its_weight() {
        let pool = pool("source_hash", &[(1, 0), (3, 0), (0, 0), (4, 0)]);
        let first = upstreams_of_clients(&pool);
        assert_eq!(first, upstreams_of_clients(&pool));
        let count = |upstream: usize| first.iter().filter(|index| **index == upstream).count();
        assert_eq!(count(2), 0);
        for (upstream, expected) in [(0, 250_usize), (1, 750), (3, 1_000)] {
            assert!(count(upstream).abs_diff(expected) < 80, "{upstream}: {}", count(upstream));
        }
    }

    #[test]
    fn source_hash_moves_the_clients_of_the_one_that_leaves_and_nobody_else() {
        let pool = pool("source_hash", &[(1, 0), (1, 0), (2, 0), (1, 0), (1, 0)]);
        let before = upstreams_of_clients(&pool);
        for leaving in 0..5 {
            let changes: [fn(&mut Candidate); 3] = [
                |candidate| candidate.health = Health::Unhealthy,
                |candidate| candidate.admin = AdminState::Draining,
                |candidate| candidate.admin = AdminState::Disabled,
            ];
            for change in changes {
                let pool = changed(&pool, |upstreams| change(&mut upstreams[leaving].candidate));
                let mut taken_over = HashMap::new();
                for (before, after) in before.iter().zip(upstreams_of_clients(&pool)) {
                    match *before == leaving {
                        true => *taken_over.entry(after).or_insert(0_usize) += 1,
                        false => assert_eq!(*before, after),
                    }
                }
                assert!(taken_over.len() == 4 && !taken_over.contains_key(&leaving), "spread over all: {taken_over:?}");
            }
        }
    }

    #[test]
    fn source_hash_has_the_same_second_choice_whatever_the_reason() {
        let pool = pool("source_hash", &[(1, 1), (1, 1), (1, 1)]);
        for index in 0..200 {
            let own = pool.pick(client(index), &[]).unwrap();
            let second = pool.pick(client(index), &[]).unwrap();
            let third = pool.pick(client(index), &[]).unwrap();
            assert_eq!(pool.pick(client(index), &[]).unwrap_err(), PickError::Full);
            let order = [own.index, second.index, third.index];
            drop((own, second, third));
            assert_eq!(pool.pick(client(index), &order[..1]).unwrap().index, order[1], "tried");
            assert_eq!(pool.pick(client(index), &order[..2]).unwrap().index, order[2], "tried");
            let without = changed(&pool, |upstreams| upstreams[order[0]].candidate.health = Health::Unhealthy);
            assert_eq!(without.pick(client(index), &[]).unwrap().index, order[1], "unhealthy");
        }
    }

    #[test]
    fn source_hash_finds_the_last_one_with_a_sliver_of_the_slots() {
        let mut upstreams = vec![(256, 1); 200];
        upstreams.push((1, 0));
        let pool = pool("source_hash", &upstreams);
        let _held: Vec<Lease> = (0..200).map(|index| pool.upstreams[index].life.lease(1).unwrap()).collect();
        assert_eq!(upstreams_of_clients(&pool), vec![200; 2_000]);
    }

    #[test]
    fn source_hash_leaves_clients_where_they_are_when_backups_come_and_none_is_healthy() {
        let pool = pool("source_hash", &[(1, 0), (1, 0), (1, 0), (1, 0)]);
        let with_backup = changed(&pool, |upstreams| upstreams[3].candidate.backup = true);
        let own = upstreams_of_clients(&with_backup);
        assert!(!own.contains(&3));
        let all_but_backup = changed(&with_backup, |upstreams| {
            upstreams[..3].iter_mut().for_each(|upstream| upstream.candidate.health = Health::Unhealthy);
        });
        assert_eq!(upstreams_of_clients(&all_but_backup), vec![3; 2_000]);
        // Fail open: everyone, as when all are well and there is no backup.
        let nobody = changed(&with_backup, |upstreams| {
            upstreams.iter_mut().for_each(|upstream| upstream.candidate.health = Health::Unhealthy);
        });
        assert_eq!(upstreams_of_clients(&nobody), upstreams_of_clients(&pool));
    }

    #[test]
    fn source_hash_gives_a_slow_starter_its_clients_back_by_and_by() {
        let pool = pool("source_hash", &[(1, 0), (1, 0), (1, 0)]);
        let own = upstreams_of_clients(&pool);
        let mut back = 0;
        for step in 1..=balance::SLOW_START_STEPS {
            let starting = changed(&pool, |upstreams| upstreams[1].slow_start_step = step);
            let now = upstreams_of_clients(&starting);
            assert!(own.iter().zip(&now).all(|(own, now)| own == now || *own == 1), "the others' clients stay");
            let of_starter = now.iter().filter(|index| **index == 1).count();
            assert!(of_starter > back, "step {step}: {of_starter} after {back}");
            back = of_starter;
        }
        assert_eq!(back, own.iter().filter(|index| **index == 1).count());
    }

    #[test]
    fn source_hash_builds_no_table_for_a_flip_or_another_order_in_the_file() {
        let pool = pool("source_hash", &[(1, 0), (1, 0), (1, 0)]);
        let mut known = Tables::default();
        let mut again = |upstreams| Pool::new(Arc::clone(&pool.config), upstreams, Arc::default(), &mut known);
        let first = again(pool.upstreams.clone());
        let mut upstreams = pool.upstreams.clone();
        upstreams.reverse();
        upstreams[0].candidate.health = Health::Unhealthy;
        upstreams[1].slow_start_step = 3;
        let second = again(upstreams);
        let table = |pool: &Pool| Arc::clone(&pool.tiers[0].sources.as_ref().unwrap().table);
        assert!(Arc::ptr_eq(&table(&first), &table(&second)));
    }
}
