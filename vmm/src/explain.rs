//! Why there is no machine, in the words of its configuration.
use config::{
    MachineConfig,
    cli::{Places, Problems},
};
use machine::BuildError;

/// What keeps the machine that `config` describes from being made, each with where it was asked
/// for.
pub fn explain(places: &Places, errors: Vec<BuildError>, config: &MachineConfig) -> Problems {
    let told = |error: BuildError| (error.part(), format!("{:#}", anyhow::Error::from(error)));
    places.explain(errors.into_iter().map(told), config)
}
