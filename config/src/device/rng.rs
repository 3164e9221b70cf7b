//! The source of randomness: `-rng`, `rng` of the file, and `-device virtio-rng-device` with
//! `-object rng-random`.
use std::path::{Path, PathBuf};

use state::config as saved;

use super::{DeviceConfig, Facts};
use crate::{
    cli::{
        draft::{DeviceKind, Draft},
        fields::Fields,
        kinds::{FileKey, Kind, Model, Section},
        resolve::{Found, Resolver},
        table::{Era, Group, Shape, flag},
    },
    saved::{DescriptionError, checked},
    types::{Id, RngBps},
};

/// Where none is given.
const DEFAULT_ID: Id = Id::fixed("rng0");

/// virtio-rng.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngConfig {
    /// Id, unique among all devices.
    pub id: Id,
    /// Source of randomness.
    pub path: PathBuf,
    /// Bytes per second; `None`: unlimited.
    pub bps: Option<RngBps>,
}

impl Facts for RngConfig {
    fn slot(&self) -> &'static str {
        "rng"
    }

    fn flag(&self) -> &'static str {
        "-rng"
    }

    fn id(&self) -> &Id {
        &self.id
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn saved(&self) -> saved::Contents {
        let Self { id, path, bps } = self.clone();
        saved::Contents::Rng(saved::Rng { id: id.into(), path, bps: bps.map(RngBps::get) })
    }
}

impl RngConfig {
    pub(super) fn restored(saved: &saved::Rng) -> Result<Self, DescriptionError> {
        let saved::Rng { id, path, bps } = saved.clone();
        let limit = |bps| checked("bytes per second of the rng", bps);
        Ok(Self { id: checked("rng", id)?, path, bps: bps.map(limit).transpose()? })
    }

    pub(super) fn replace(&mut self, wanted: &Self) {
        self.path.clone_from(&wanted.path);
    }
}

/// Its row of the table.
pub(crate) const KIND: Kind = Kind {
    section: ("rng", Section::Object(rng)),
    paths: &[FileKey { key: "random_file", needed: true }],
    flags: &[flag(
        &["rng"],
        Shape::Properties("random_file=PATH[,bytes_per_sec=N]", None),
        Group::Other,
        rng,
        "virtio-rng",
    )
    .only(Era::Old)],
    models: &[Model {
        name: "virtio-rng-device",
        id: "[,id=ID]",
        form: ",rng=ID[,max-bytes=N,period=MS]",
        make: model,
    }],
    resolve: |r, draft, devices| {
        let rngs = resolve(r, draft);
        let rule = "there can be one virtio-rng (-device virtio-rng-device, -rng, rng)";
        devices.others.extend(r.only_one(rngs, rule));
    },
};

/// `-rng`, and `rng`.
fn rng(draft: &mut Draft, f: &mut Fields) {
    f.require(&["random_file"]);
    let bps = f.parsed("bytes_per_sec");
    if let Some(path) = f.path("random_file") {
        let rng = RngConfig { id: DEFAULT_ID, path, bps };
        draft.say(f.place().key("random_file"), DeviceConfig::Rng(rng));
    }
}

/// `max-bytes` per `period` milliseconds, both or neither.
fn model(f: &mut Fields) -> DeviceKind {
    f.require(&["rng"]);
    let source = f.id("rng");
    let (most, period) =
        (f.number("max-bytes", 1..=u64::MAX), f.number("period", 1..=u64::from(u32::MAX)));
    if f.has("max-bytes") != f.has("period") {
        f.problem("max-bytes", "max-bytes and period (in milliseconds) must be given together");
    }
    let bps = most.zip(period).and_then(|(most, period)| {
        let bps = most.saturating_mul(1000).checked_div(period)?;
        let limit = RngBps::try_from(bps);
        limit.inspect_err(|e| f.problem("max-bytes", format!("{bps} bytes per second, {e}"))).ok()
    });
    DeviceKind::Rng { source, bps }
}

fn resolve(r: &mut Resolver, d: &Draft) -> Vec<Found> {
    let mut rngs = vec![];
    for device in &d.devices {
        let DeviceKind::Rng { source: Some(source), bps } = &device.kind else { continue };
        match d.rng_sources.iter().find(|known| known.id == *source) {
            Some(found) => {
                let id = device.id.clone().unwrap_or_else(|| r.fresh_id(&DEFAULT_ID));
                let rng = RngConfig { id, path: found.path.clone(), bps: *bps };
                let (place, said) = (device.place.clone(), found.place.key("filename"));
                rngs.push(Found { place, said, device: DeviceConfig::Rng(rng) });
            }
            None => r.missing(&device.place, "rng", "object rng-random", source),
        }
    }
    rngs.extend(r.whole(d, |device| matches!(device, DeviceConfig::Rng(_))));
    rngs
}
