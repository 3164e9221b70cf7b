//! The memory balloon: `-balloon`, `-device virtio-balloon-device`, and `balloon` of the file.
use state::config as saved;

use super::{DeviceConfig, Differs, Facts};
use crate::{
    cli::{
        draft::{DeviceKind, Draft},
        fields::Fields,
        kinds::{Kind, Model, Section},
        table::{Group, Shape, flag},
    },
    saved::{DescriptionError, checked},
    types::Id,
};

/// Where none is given.
const DEFAULT_ID: Id = Id::fixed("balloon0");

/// A memory balloon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BalloonConfig {
    /// Id, unique among all devices.
    pub id: Id,
    /// The guest deflates it rather than run out of memory.
    pub deflate_on_oom: bool,
    /// The guest reports the pages that it has freed.
    pub free_page_reporting: bool,
}

impl Facts for BalloonConfig {
    fn slot(&self) -> &'static str {
        "balloon"
    }

    fn flag(&self) -> &'static str {
        "-balloon"
    }

    fn id(&self) -> &Id {
        &self.id
    }

    fn saved(&self) -> saved::Contents {
        let Self { id, deflate_on_oom, free_page_reporting } = self.clone();
        saved::Contents::Balloon(saved::Balloon {
            id: id.into(),
            deflate_on_oom,
            free_page_reporting,
        })
    }
}

impl BalloonConfig {
    pub(super) fn restored(saved: &saved::Balloon) -> Result<Self, DescriptionError> {
        let saved::Balloon { id, deflate_on_oom, free_page_reporting } = saved.clone();
        Ok(Self { id: checked("balloon", id)?, deflate_on_oom, free_page_reporting })
    }

    /// Only equal settings: the guest has seen them.
    pub(super) fn replace(&mut self, wanted: &Self) -> Result<(), Differs> {
        let shown = |balloon: &Self| {
            let Self { deflate_on_oom, free_page_reporting, .. } = balloon;
            format!("deflate-on-oom={deflate_on_oom},free-page-reporting={free_page_reporting}")
        };
        let (saved, asked) = (shown(self), shown(wanted));
        if saved != asked {
            return Err(Differs { what: "a balloon with", flag: "-balloon", saved, asked });
        }
        self.id.clone_from(&wanted.id);
        Ok(())
    }
}

/// Its row of the table.
pub(crate) const KIND: Kind = Kind {
    section: ("balloon", Section::Object(section)),
    paths: &[],
    flags: &[flag(
        &["balloon"],
        Shape::OptionalProperties("deflate-on-oom=on|off[,free-page-reporting=on|off]"),
        Group::Other,
        balloon,
        "virtio-balloon, which the QMP command balloon fills; deflate-on-oom (off): the guest \
         deflates it rather than run out of memory; free-page-reporting (off): freed pages return \
         to the host",
    )],
    models: &[Model {
        name: "virtio-balloon-device",
        id: "[,id=ID]",
        form: "[,deflate-on-oom=on|off][,free-page-reporting=on|off]",
        make: |f| {
            DeviceKind::Whole(DeviceConfig::Balloon(read(
                f,
                "deflate-on-oom",
                "free-page-reporting",
            )))
        },
    }],
    resolve: |r, draft, devices| {
        let balloons = r.whole(draft, |device| matches!(device, DeviceConfig::Balloon(_)));
        let rule =
            "there can be one virtio-balloon (-device virtio-balloon-device, -balloon, balloon)";
        devices.others.extend(r.only_one(balloons, rule));
    },
};

/// `balloon` of the file.
fn section(draft: &mut Draft, f: &mut Fields) {
    f.require(&["deflate_on_oom"]);
    let balloon = read(f, "deflate_on_oom", "free_page_reporting");
    draft.say(f.place().clone(), DeviceConfig::Balloon(balloon));
}

/// `-balloon`.
fn balloon(draft: &mut Draft, f: &mut Fields) {
    let balloon = read(f, "deflate-on-oom", "free-page-reporting");
    draft.say(f.place().clone(), DeviceConfig::Balloon(balloon));
}

fn read(
    f: &mut Fields,
    deflate_on_oom: &'static str,
    free_page_reporting: &'static str,
) -> BalloonConfig {
    BalloonConfig {
        id: DEFAULT_ID,
        deflate_on_oom: f.boolean(deflate_on_oom).unwrap_or(false),
        free_page_reporting: f.boolean(free_page_reporting).unwrap_or(false),
    }
}
