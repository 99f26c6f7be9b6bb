//! PURE. `balance = "source_hash"`: which upstream is a client's own, the same on every replica without a word between
//! them.
//!
//! A table of `SLOTS` slots, filled as Maglev does (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load
//! Balancer", NSDI 2016, section 3.4), says which upstream owns which slot. It is made of the upstreams' names and weights
//! and nothing else: neither the order of the file nor health, machine or version change it. A client's address gives
//! the order in which that client looks at slots. The owner of the first one is its upstream; where that one takes
//! nothing, or has no room, or was tried, the next slot's owner has it, and so on. So a flip of health moves the clients
//! of that upstream and nobody else, and they come back with it.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use siphasher::sip::SipHasher13;

use super::balance::SLOW_START_STEPS;

/// Slots of a table: a prime, so that every step through them reaches all.
pub const SLOTS: usize = 65_537;

/// Slots that a client looks at before it takes the upstreams one by one. Where one upstream in ten takes
/// connections, one client in a million gets that far.
pub const LOOKS_MAX: usize = 128;

/// Keys of SipHash-1-3. Other ones move every client: they are part of what replicas of different versions agree on.
const UPSTREAM_KEYS: (&[u8; 8], &[u8; 8]) = (b"preface ", b"upstream");
const CLIENT_KEYS: (&[u8; 8], &[u8; 8]) = (b"preface ", b"client  ");

fn hash((first, second): (&[u8; 8], &[u8; 8]), bytes: &[u8]) -> u64 {
    SipHasher13::new_with_keys(u64::from_le_bytes(*first), u64::from_le_bytes(*second)).hash(bytes)
}

/// An upstream as a table knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Member {
    /// Its address as text; without the port where that is the listener's, so that a client has the same upstream on all
    /// ports of a listener.
    pub name: String,
    /// As configured, above 0.
    pub weight: u32,
}

/// Who owns which slot.
#[derive(Debug)]
pub struct Table {
    members: Vec<Member>,
    /// Index in `members`.
    owners: Box<[u16]>,
}

/// A slot that nobody owns yet.
const FREE: u16 = u16::MAX;

/// Whose turn it is to take a slot.
#[derive(Debug, PartialEq, Eq)]
struct Turn {
    taken: u64,
    weight: u64,
    index: usize,
}

impl Turn {
    /// Twice the share at which its next slot is due: half a slot early, so that shares are rounded and not cut. The first
    /// one is due at once.
    fn due(&self) -> u64 {
        if self.taken == 0 { 0 } else { 2 * self.taken + 1 }
    }
}

impl Ord for Turn {
    /// The one whose slot is due first, for its weight, is the greatest, as a heap wants it.
    fn cmp(&self, other: &Turn) -> Ordering {
        let due = (self.due() * other.weight).cmp(&(other.due() * self.weight));
        due.then(self.index.cmp(&other.index)).reverse()
    }
}

impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Turn) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Table {
    /// In turn, each as often as its weight says, the members take the next slot of their own orders that is still free.
    /// Shares are rounded to whole slots, and nobody is without. Members come in any order; their names must differ.
    pub fn new(mut members: Vec<Member>) -> Table {
        members.sort();
        assert!(members.len() < usize::from(FREE), "a pool has fewer upstreams than a table has slots");
        let mut orders: Vec<_> =
            members.iter().map(|member| Order::of(hash(UPSTREAM_KEYS, member.name.as_bytes()))).collect();
        let turn = |(index, member): (usize, &Member)| Turn { taken: 0, weight: u64::from(member.weight), index };
        let mut turns: BinaryHeap<Turn> = members.iter().enumerate().map(turn).collect();
        let mut owners = vec![FREE; if members.is_empty() { 0 } else { SLOTS }];
        for _ in 0..owners.len() {
            let mut turn = turns.peek_mut().expect("a table with slots has members");
            let is_free = |slot: &usize| owners[*slot] == FREE;
            let slot = orders[turn.index].by_ref().find(is_free).expect("the order of each member reaches every slot");
            owners[slot] = turn.index as u16;
            turn.taken += 1;
        }
        Table { members, owners: owners.into() }
    }

    /// Those who own slots, by name.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Who owns a slot: an index in `members`.
    pub fn owner(&self, slot: usize) -> usize {
        usize::from(self.owners[slot])
    }
}

/// All slots, each once, in an order that a hash decides.
#[derive(Clone, Debug)]
pub struct Order {
    next: usize,
    step: usize,
}

impl Order {
    fn of(hash: u64) -> Order {
        Order { next: (hash & 0xFFFF_FFFF) as usize % SLOTS, step: 1 + (hash >> 32) as usize % (SLOTS - 1) }
    }
}

impl Iterator for Order {
    type Item = usize;

    /// Never ends: after `SLOTS` it begins again.
    fn next(&mut self) -> Option<usize> {
        let slot = self.next;
        self.next += self.step;
        if self.next >= SLOTS {
            self.next -= SLOTS;
        }
        Some(slot)
    }
}

/// What is left of a client's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientHash(u64);

impl ClientHash {
    /// Of the whole address and not of the port: all connections and UDP sessions of a client have one upstream. An IPv4
    /// client is the same one through an IPv6 socket. `None`: a UNIX socket's clients, which are one. Not of an IPv6
    /// network: the machines of a subnet, or the pods of a node, share a /64, and all of them would have one upstream.
    pub fn of(client: Option<IpAddr>) -> ClientHash {
        ClientHash(match client.map(|client| client.to_canonical()) {
            Some(IpAddr::V4(v4)) => hash(CLIENT_KEYS, &v4.octets()),
            Some(IpAddr::V6(v6)) => hash(CLIENT_KEYS, &v6.octets()),
            None => hash(CLIENT_KEYS, b""),
        })
    }

    /// The slots that it looks at, in this order.
    pub fn order(self) -> Order {
        Order::of(self.0)
    }

    /// Where it begins when it takes `count` upstreams one by one.
    pub fn start(self, count: usize) -> usize {
        (self.0 % count as u64) as usize
    }

    /// Is it among the first `share` of `SLOW_START_STEPS` to come back? Of the bits that its order does not depend on.
    pub fn is_among(self, share: u32) -> bool {
        (self.0 >> 48) % u64::from(SLOW_START_STEPS) < u64::from(share)
    }
}

/// How many of its clients each upstream takes, of `SLOW_START_STEPS`. `steps` is how far each one's slow start has come;
/// where all are starting, they share everything.
pub fn shares(steps: &[u32]) -> Vec<u32> {
    let steps = steps.iter().map(|step| (*step).clamp(1, SLOW_START_STEPS));
    let furthest = steps.clone().max().unwrap_or(SLOW_START_STEPS);
    steps.map(|step| (step * SLOW_START_STEPS).div_ceil(furthest)).collect()
}

/// The tables in use. One is built when the set of upstreams is a new one, and never because of health, admin state, another
/// pool or another order in the file.
#[derive(Debug, Default)]
pub struct Tables {
    known: HashMap<Vec<Member>, Arc<Table>>,
}

impl Tables {
    /// The table of these members, in any order.
    pub fn of(&mut self, mut members: Vec<Member>) -> Arc<Table> {
        members.sort();
        if let Some(table) = self.known.get(&members) {
            return Arc::clone(table);
        }
        let table = Arc::new(Table::new(members.clone()));
        self.known.insert(members, Arc::clone(&table));
        table
    }

    /// Drops those that no pool holds any more.
    pub fn forget_unused(&mut self) {
        self.known.retain(|_, table| Arc::strong_count(table) > 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn member((name, weight): (&str, u32)) -> Member {
        Member { name: name.to_owned(), weight }
    }

    /// 10.0.0.1:80, 10.0.0.2:80 ... with these weights.
    fn members(weights: &[u32]) -> Vec<Member> {
        let name = |index: usize| format!("10.0.{}.{}:80", index / 250, index % 250 + 1);
        weights.iter().enumerate().map(|(index, weight)| Member { name: name(index), weight: *weight }).collect()
    }

    fn names(table: &Table) -> Vec<&str> {
        (0..SLOTS).map(|slot| table.members()[table.owner(slot)].name.as_str()).collect()
    }

    fn slots_of(table: &Table) -> Vec<usize> {
        let mut counts = vec![0; table.members().len()];
        (0..SLOTS).for_each(|slot| counts[table.owner(slot)] += 1);
        counts
    }

    /// Which part of all slots has another owner.
    fn moved(before: &Table, after: &Table) -> f64 {
        let (before, after) = (names(before), names(after));
        before.iter().zip(&after).filter(|(before, after)| before != after).count() as f64 / SLOTS as f64
    }

    /// What replicas of different versions and machines agree on. If this test fails, an upgrade moves clients.
    #[test]
    fn the_tables_are_the_same_everywhere_and_for_ever() {
        let table = Table::new(
            [("10.0.0.30:80", 1), ("10.0.0.31:80", 3), ("[2001:db8::30]:80", 2), ("10.0.0.32", 4)].map(member).into(),
        );
        let bytes: Vec<u8> = table.owners.iter().flat_map(|owner| owner.to_le_bytes()).collect();
        let first: Vec<usize> = (0..24).map(|slot| table.owner(slot)).collect();
        insta::assert_debug_snapshot!((hash(UPSTREAM_KEYS, &bytes), slots_of(&table), first));
    }

    #[test]
    fn the_clients_are_the_same_everywhere_and_for_ever() {
        let table = Table::new(members(&[1; 10]));
        let clients =
            ["192.0.2.1", "192.0.2.2", "10.1.2.3", "127.0.0.1", "2001:db8::1", "2001:db8::2", "fe80::1", "::1"];
        let own = |client: Option<IpAddr>| {
            let order = ClientHash::of(client).order();
            let owners = order.take(3).map(|slot| &table.members()[table.owner(slot)].name);
            owners.map(String::as_str).collect::<Vec<_>>().join(", then ")
        };
        let of_text = |text: &str| format!("{text}: {}", own(Some(text.parse().expect("an address"))));
        let lines: Vec<String> = clients.into_iter().map(of_text).chain([format!("unix: {}", own(None))]).collect();
        insta::assert_snapshot!(lines.join("\n"));
    }

    #[test]
    fn an_order_reaches_every_slot_once() {
        for hash in [0, u64::MAX, 0xFFFF_0000_0000, 0x1_0000_FFFF_FFFF, 0x0123_4567_89AB_CDEF] {
            let mut seen = vec![false; SLOTS];
            Order::of(hash).take(SLOTS).for_each(|slot| assert!(!std::mem::replace(&mut seen[slot], true)));
            assert_eq!(Order::of(hash).nth(SLOTS), Order::of(hash).next());
        }
    }

    #[test]
    fn a_client_is_its_address() {
        let of = |text: &str| ClientHash::of(Some(text.parse().expect("an address")));
        assert_eq!(of("192.0.2.1"), of("::ffff:192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_ne!(of("2001:db8::1"), of("2001:db8::2"), "of one /64");
        assert_ne!(of("0.0.0.0"), ClientHash::of(None));
    }

    #[test]
    fn clients_are_spread_as_slots_are() {
        let weights = [1, 2, 3, 4];
        let table = Table::new(members(&weights));
        let mut counts = [0_i64; 4];
        for low in 0..=u16::MAX {
            let [high, low] = low.to_be_bytes();
            let client = ClientHash::of(Some(IpAddr::from([10, 0, high, low])));
            counts[table.owner(client.order().next().expect("a first slot"))] += 1;
        }
        for (count, weight) in counts.iter().zip(weights) {
            let expected = 65_536 * i64::from(weight) / 10;
            // About four times what chance gives.
            assert!((count - expected).abs() < 500, "{counts:?}");
        }
    }

    #[test]
    fn nobody_is_without_a_slot() {
        let mut weights = vec![256; 1_023];
        weights.push(1);
        assert!(slots_of(&Table::new(members(&weights))).iter().all(|count| *count > 0));
        assert_eq!(slots_of(&Table::new(members(&[7]))), [SLOTS]);
        assert!(Table::new(Vec::new()).members().is_empty());
    }

    /// What the README says of an upstream that joins or leaves: one direction is the other.
    #[test]
    fn little_more_than_its_share_moves_with_one_upstream() {
        // A quarter of a percent with 10 upstreams, seven tenths with 256.
        for (count, more) in [(2, 0.0001), (3, 0.001), (5, 0.002), (10, 0.004), (20, 0.006), (100, 0.008), (256, 0.01)]
        {
            let all = members(&vec![1; count]);
            let before = Table::new(all.clone());
            for gone in [0, count / 2, count - 1] {
                let mut rest = all.clone();
                rest.remove(gone);
                let moved = moved(&before, &Table::new(rest));
                let share = 1.0 / count as f64;
                assert!(moved >= share - 0.0001 && moved <= share + more, "{count} upstreams: {moved} moved");
            }
        }
    }

    #[test]
    fn a_small_change_of_weight_moves_little() {
        let before = Table::new(members(&[100; 10]));
        for (weight, most) in [(101, 0.002), (110, 0.012), (50, 0.055)] {
            let mut weights = [100; 10];
            weights[3] = weight;
            let moved = moved(&before, &Table::new(members(&weights)));
            assert!(moved <= most, "100 -> {weight}: {moved} moved");
        }
        // As far as one cannot see it, there is nothing to move.
        assert_eq!(moved(&before, &Table::new(members(&[7; 10]))), 0.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn shares_are_those_of_the_weights(weights in proptest::collection::vec(1_u32..=256, 1..60)) {
            let table = Table::new(members(&weights));
            let counts = slots_of(&table);
            let sum: u32 = weights.iter().sum();
            for (count, member) in counts.iter().zip(table.members()) {
                let exact = SLOTS as f64 * f64::from(member.weight) / f64::from(sum);
                prop_assert!((*count as f64 - exact).abs() < 2.0, "{} slots, exactly {}", count, exact);
            }
        }

        #[test]
        fn the_order_of_the_file_does_not_matter(
            weights in proptest::collection::vec(1_u32..=256, 2..12),
            turn in 0_usize..12,
        ) {
            let mut other = members(&weights);
            other.reverse();
            let turn = turn % other.len();
            other.rotate_left(turn);
            prop_assert_eq!(moved(&Table::new(members(&weights)), &Table::new(other)), 0.0);
        }

        #[test]
        fn with_weights_too_little_more_moves_than_must(
            weights in proptest::collection::vec(1_u32..=256, 2..12),
            gone in 0_usize..12,
        ) {
            let all = members(&weights);
            let gone = gone % all.len();
            let share = f64::from(weights[gone]) / f64::from(weights.iter().sum::<u32>());
            let mut rest = all.clone();
            rest.remove(gone);
            let moved = moved(&Table::new(all), &Table::new(rest));
            prop_assert!(moved <= share + 0.01, "share {}, moved {}", share, moved);
        }
    }

    #[test]
    fn a_slow_start_admits_a_part_of_the_clients_and_none_leaves_again() {
        assert_eq!(shares(&[16, 4, 0]), [16, 4, 1]);
        assert_eq!(shares(&[2, 1]), [16, 8], "all are starting");
        let clients = (0..4_096_u32).map(|client| ClientHash::of(Some(IpAddr::from(client.to_be_bytes()))));
        let clients: Vec<ClientHash> = clients.collect();
        for share in 1..=SLOW_START_STEPS {
            let admitted = clients.iter().filter(|client| client.is_among(share)).count() as i64;
            assert!((admitted - 256 * i64::from(share)).abs() < 128, "{share}: {admitted}");
            assert!(clients.iter().all(|client| !client.is_among(share - 1) || client.is_among(share)));
        }
    }

    #[test]
    fn a_table_is_built_once_for_a_set() {
        let mut tables = Tables::default();
        let first = tables.of(members(&[1, 2]));
        let mut turned = members(&[1, 2]);
        turned.reverse();
        assert!(Arc::ptr_eq(&first, &tables.of(turned)));
        assert!(!Arc::ptr_eq(&first, &tables.of(members(&[2, 1]))));
        tables.forget_unused();
        assert_eq!(tables.known.len(), 1, "one is still held");
    }
}
