//! Breadth first through all worlds.
use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{Hash, Hasher},
};

use crate::{
    moves::{Move, after, moves},
    world::{Bounds, Role, World},
};

/// How a world is reached: steps, and whether its process died at it.
pub type Path = Vec<(Move, bool)>;

/// What a search has found.
pub struct Found {
    pub states: usize,
    /// The first violation, and the path to it.
    pub broken: Option<(String, Path)>,
    pub ran: usize,
    pub solo: usize,
    pub cold: usize,
    /// Worlds from which no process ever owns the guest again, although its primary never died and
    /// no other process ever ran it.
    pub lost: Vec<Path>,
}

/// A world's name: 128 bits, so that no two of some millions share one. The hasher is a simple one,
/// since most of the time of a search would go into a better one.
fn name(world: &World) -> u128 {
    let mut lanes = Lanes(0x9e37_79b9_7f4a_7c15, 0xd1b5_4a32_d192_ed03);
    world.hash(&mut lanes);
    u128::from(lanes.finish()) << 64 | u128::from(lanes.1 ^ lanes.1 >> 29)
}

/// Two independent multiplicative hashes.
struct Lanes(u64, u64);

impl Hasher for Lanes {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 31
    }

    fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(word.into());
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }

    fn write_u64(&mut self, word: u64) {
        let mix = |lane: u64, by: u64| {
            let wide = u128::from(lane ^ word) * u128::from(by);
            (wide as u64 ^ (wide >> 64) as u64).rotate_left(23).wrapping_add(word)
        };
        self.0 = mix(self.0, 0xa076_1d64_78bd_642f);
        self.1 = mix(self.1, 0xe703_7ed1_a0b4_28db);
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }
}

/// Visit every world within `bounds`, until one is wrong or there are `most`.
pub fn explore(bounds: &Bounds, most: usize, liveness: bool) -> Found {
    let mut first = World::new(bounds);
    first.normalise();
    let mut seen: HashMap<u128, u32> = HashMap::from([(name(&first), 0)]);
    // For each world: from which it was reached first, and how.
    let mut origin: Vec<(u32, Option<(Move, bool)>)> = vec![(0, None)];
    let mut edges: Vec<(u32, u32)> = Vec::new();
    let (mut owned, mut kept) = (vec![owned_by_any(&first)], vec![keeps(&first)]);
    let mut layer = vec![(0u32, first)];
    let mut found = Found { states: 1, broken: None, ran: 0, solo: 0, cold: 0, lost: Vec::new() };
    while !layer.is_empty() && origin.len() < most {
        let mut next = Vec::new();
        for (number, world) in layer {
            for (step, cut_short, to) in successors(&world, bounds) {
                let new = match seen.entry(name(&to)) {
                    Entry::Occupied(known) => {
                        if liveness {
                            edges.push((number, *known.get()));
                        }
                        continue;
                    }
                    Entry::Vacant(free) => *free.insert(u32::try_from(origin.len()).unwrap()),
                };
                origin.push((number, Some((step, cut_short))));
                if liveness {
                    edges.push((number, new));
                    owned.push(owned_by_any(&to));
                    kept.push(keeps(&to));
                }
                if let Some(wrong) = to.wrong() {
                    found.states = origin.len();
                    found.broken = Some((wrong, path(&origin, new)));
                    return found;
                }
                found.ran += usize::from(to.facts.values().any(|facts| facts.ran.is_some()));
                found.solo += usize::from(to.facts.values().any(|facts| facts.solo));
                found.cold += usize::from(to.facts.values().any(|facts| facts.cold));
                next.push((new, to));
            }
        }
        layer = next;
    }
    found.states = origin.len();
    assert!(layer.is_empty(), "more than {most} worlds, and nothing wrong so far");
    if liveness {
        let mut back = vec![Vec::new(); origin.len()];
        for (from, to) in edges {
            back[to as usize].push(from);
        }
        let mut open: Vec<u32> =
            (0u32..).zip(&owned).filter(|(_, owned)| **owned).map(|(n, _)| n).collect();
        while let Some(world) = open.pop() {
            for from in back[world as usize].drain(..) {
                if !std::mem::replace(&mut owned[from as usize], true) {
                    open.push(from);
                }
            }
        }
        let lost =
            (0u32..).zip(owned.iter().zip(&kept)).filter(|(_, (owned, kept))| !**owned && **kept);
        found.lost = lost.map(|(n, _)| path(&origin, n)).collect();
    }
    found
}

/// Every world that can follow. A process may also die at each of the outputs of a step.
fn successors(world: &World, bounds: &Bounds) -> Vec<(Move, bool, World)> {
    let mut all = Vec::new();
    for step in moves(world, bounds) {
        if let Some(to) = after(world, bounds, step, None) {
            all.push((step, false, to));
        }
        if world.kills > 0 && !bounds.slow {
            let cut_short = (0..).map_while(|most| after(world, bounds, step, Some(most)));
            all.extend(cut_short.map(|to| (step, true, to)));
        }
    }
    all
}

fn owned_by_any(world: &World) -> bool {
    world.nodes.iter().any(|node| node.free && !node.parked)
}

/// Whether the guest's first process has never died and no other one has run it.
fn keeps(world: &World) -> bool {
    let alive = world.nodes[0].incarnation.0 == 10 && world.nodes[0].role != Role::Dead;
    alive && world.facts.values().all(|facts| facts.ran.is_none() && !facts.cold)
}

fn path(origin: &[(u32, Option<(Move, bool)>)], mut at: u32) -> Path {
    let mut path = Vec::new();
    while let (from, Some(step)) = origin[at as usize] {
        path.push(step);
        at = from;
    }
    path.reverse();
    path
}
