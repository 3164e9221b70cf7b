//! The back-ends of devices: those of this host, or null ones for devices that only load a saved
//! state.
use std::{io, sync::Arc};

use config::{CharBackend, DiskConfig, NicConfig, types::PerSecond};
use devices::{
    backend::{
        char::{Char, CharError},
        disk::Disk,
        net::{NetBackend, NoNetwork},
    },
    virtio::{blk, net},
};

use crate::{BuildError, Callbacks, Event, Report, ReportToken, backends, legacy};

/// Where back-ends come from.
#[derive(Clone, Copy)]
pub(crate) enum Backing<'a> {
    /// Back-ends are opened and report through `callbacks`. Without `held`, another process still
    /// has the disks and the named taps and will release them: disks are opened without their
    /// locks, and taps are attached later.
    Host { callbacks: &'a Callbacks, held: bool },
    /// Nothing is opened. The disks, by slot, have these sizes in bytes.
    Nothing(&'a [u64]),
}

impl Backing<'_> {
    /// A character back-end.
    pub(crate) fn char(self, backend: &CharBackend) -> Result<Char, CharError> {
        match self {
            Self::Host { callbacks, .. } => legacy::open(backend, callbacks),
            Self::Nothing(_) => Char::null(),
        }
    }

    /// The device of a disk slot. Its queues are those of the disk it had at the start, `shape`,
    /// whichever `disk` is in it now.
    pub(crate) fn block(
        self,
        slot: usize,
        shape: Option<&DiskConfig>,
        disk: Option<&DiskConfig>,
    ) -> Result<blk::Block, BuildError> {
        let on_error = match self {
            Self::Host { callbacks, .. } => Some(on_error(callbacks.report.clone())),
            Self::Nothing(_) => None,
        };
        let settings = blk::Settings {
            queues: shape.map(|s| s.queues).unwrap_or_default().get(),
            queue_size: shape.map(|s| s.queue_size).unwrap_or_default().get(),
            on_error,
        };
        let id = disk.or(shape).map_or_else(|| format!("disk{slot}"), |d| d.id.to_string());
        let open = |config: &DiskConfig| match self {
            Self::Host { held: true, .. } => backends::open(config),
            Self::Host { held: false, .. } => {
                Disk::open_unheld(&config.path, &backends::options(config))
            }
            Self::Nothing(sizes) => {
                let size = sizes.get(slot).copied().unwrap_or(0);
                Disk::without_image(&config.path, &backends::options(config), size)
            }
        };
        let backend = disk.map(|config| {
            let backend = backends::limited(Arc::new(open(config)?), config);
            Ok(match self {
                Self::Host { .. } => backend,
                Self::Nothing(_) => blk::Backend { expect: blk::Expect::Any, ..backend },
            })
        });
        let backend =
            backend.transpose().map_err(|source| BuildError::Disk { id: id.clone(), source })?;
        Ok(blk::Block::new(id, settings, backend))
    }

    /// The device of a NIC slot, as [`Backing::block`].
    pub(crate) fn interface(
        self,
        slot: usize,
        shape: Option<&NicConfig>,
        nic: Option<&NicConfig>,
    ) -> Result<net::Net, BuildError> {
        let id = nic.or(shape).map_or_else(|| format!("nic{slot}"), |n| n.id.to_string());
        let settings = net::NetSettings {
            mac: nic.or(shape).and_then(|n| n.mac),
            queue_pairs: shape.map(|s| s.queue_pairs).unwrap_or_default().get(),
            queue_size: shape.map(|s| s.queue_size).unwrap_or_default().get(),
            pps: nic.and_then(|n| n.pps).map(PerSecond::get),
            bps: nic.and_then(|n| n.bps).map(PerSecond::get),
        };
        let awaited = matches!(self, Self::Host { held: false, .. })
            && nic.is_some_and(|nic| matches!(nic.tap, config::Tap::Name(_)));
        let open = |nic: &NicConfig| -> Result<Arc<dyn NetBackend>, BuildError> {
            Ok(match self {
                Self::Host { .. } => {
                    let failed = |source| BuildError::Tap { id: id.clone(), source };
                    Arc::new(backends::tap(nic).map_err(failed)?)
                }
                Self::Nothing(_) => {
                    let failed = |source| BuildError::Descriptor { id: id.clone(), source };
                    Arc::new(NoNetwork::new(settings.queue_pairs.into()).map_err(failed)?)
                }
            })
        };
        let backend = nic.filter(|_| !awaited).map(open).transpose()?;
        let mut net = net::Net::new(id.clone(), settings, backend)
            .map_err(|source| BuildError::NicSettings { id, source })?;
        if awaited {
            net.await_backend();
        }
        Ok(net)
    }
}

fn on_error(report: Report) -> blk::OnError {
    let token = ReportToken::default();
    Arc::new(move |id, error, write| {
        let Some(token) = token.begin() else { return };
        let error = io::Error::new(error.kind(), error.to_string());
        report(Event::DiskError { id: id.into(), write, error, token });
    })
}
