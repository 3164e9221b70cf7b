//! How the machine builds each kind of device that has a slot of its own: each kind has an arm in
//! [`Backing::device`].
use std::sync::Arc;

use config::{BalloonConfig, ConsoleConfig, DeviceConfig, RngConfig, types::RngBps};
use devices::{
    reclaim::Reclaim,
    virtio::{
        VirtioDevice,
        balloon::{self, Balloon},
        console::Console,
        rng::Rng,
    },
};

use vm_memory::GuestAddress;

use crate::{BuildError, Event, ReportToken, backing::Backing, legacy::Outside};

/// A device, and what the machine keeps for it.
pub(crate) struct Built {
    pub device: Box<dyn VirtioDevice>,
    pub kept: Kept,
}

/// A handle by which the machine reaches a device even while the device is busy.
pub(crate) enum Kept {
    Nothing,
    /// The back-end side of its character stream, and its label.
    Chars(String, Outside),
    Balloon(Arc<balloon::Control>),
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

impl Backing<'_> {
    /// The device that `config` describes. `memory` reclaims what the guest gives back.
    pub(crate) fn device(
        self,
        config: &DeviceConfig,
        memory: &Arc<dyn Reclaim>,
    ) -> Result<Built, BuildError> {
        let built = match config {
            DeviceConfig::Console(config) => self.console(config),
            DeviceConfig::Rng(config) => self.rng(config),
            DeviceConfig::Balloon(config) => self.balloon(config, memory),
        };
        built.map_err(|source| {
            let (kind, id) = (config.facts().slot(), config.facts().id().to_string());
            BuildError::Device { kind, id, source }
        })
    }

    fn console(self, config: &ConsoleConfig) -> Result<Built, Failure> {
        let char = self.char(&config.backend)?;
        let id = config.id.to_string();
        let kept = Kept::Chars(id.clone(), Outside::of(&char));
        Ok(Built { device: Box::new(Console::new(id, char)), kept })
    }

    fn rng(self, config: &RngConfig) -> Result<Built, Failure> {
        let (id, bps) = (config.id.to_string(), config.bps.map(RngBps::get));
        let rng = match self {
            Self::Host { .. } => Rng::new(id, &config.path, bps),
            Self::Nothing(_) => Rng::without_source(id, bps),
        };
        Ok(Built { device: Box::new(rng?), kept: Kept::Nothing })
    }

    fn balloon(self, config: &BalloonConfig, memory: &Arc<dyn Reclaim>) -> Result<Built, Failure> {
        let settings = balloon::Settings {
            deflate_on_oom: config.deflate_on_oom,
            page_reporting: config.free_page_reporting,
        };
        let on_change: balloon::OnChange = match self {
            Self::Host { callbacks, .. } => {
                let (report, token) = (callbacks.report.clone(), ReportToken::default());
                Box::new(move || {
                    if let Some(token) = token.begin() {
                        report(Event::BalloonChanged(token));
                    }
                })
            }
            Self::Nothing(_) => Box::new(|| ()),
        };
        let balloon = Balloon::new(config.id.to_string(), settings, memory.clone(), on_change)?;
        let kept = Kept::Balloon(balloon.control());
        Ok(Built { device: Box::new(balloon), kept })
    }
}

/// The reclaimer of a machine that never runs.
pub(crate) struct NoReclaim;

impl Reclaim for NoReclaim {
    fn discard(&self, _: GuestAddress, _: u64) {}
    fn withhold(&self, _: GuestAddress, _: u64) {}
    fn release(&self, _: GuestAddress, _: u64) {}
    fn release_all(&self) {}
}
