//! Reactions to the guest's power-off, reboot or crash.
use crate::actions::{
    Action::{End, Reset, Stay},
    Actions,
};

use super::{file, file_problems, problem, run};

fn actions(line: &str) -> Actions {
    run(&format!("-kernel k -api-channel unix:s {line}")).actions
}

fn domain(text: &str, line: &str) -> Actions {
    let text = format!(r#"{{"boot-source":{{"kernel_image_path":"k"}},"domain":{text}}}"#);
    file(&text, &format!("-api-channel unix:s {line}")).unwrap().actions
}

#[test]
fn every_event_is_the_end_unless_configured() {
    let default = Actions::default();
    assert_eq!(actions(""), default);
    assert_eq!(domain("{}", ""), default);
    let said = "-action shutdown=poweroff,reboot=shutdown,panic=exit-failure";
    assert_eq!(actions(said), default);
    assert_eq!(actions("-action panic=shutdown").panic_status, 0);
    let failure = actions("-action reboot=exit-failure");
    assert_eq!(failure, Actions { reboot_status: 1, ..default });
}

#[test]
fn each_is_chosen_by_itself() {
    let a = actions("-action shutdown=pause,reboot=reset,panic=pause");
    assert_eq!((a.shutdown, a.reboot, a.panic), (Stay, Reset, Stay));
    let a = actions("-action shutdown=reset -action reboot=pause -action panic=reset");
    assert_eq!((a.shutdown, a.reboot, a.panic), (Reset, Stay, Reset));
    assert!(!a.fault_panics);
    assert_eq!(
        problem("-action reboot=restart"),
        "-action reboot=restart: reboot: 'restart': must be shutdown|exit-failure|pause|reset"
    );
    assert!(problem("-action crash=pause").contains("shutdown, reboot, panic"));
}

#[test]
fn shutdown_as_an_action_is_what_a_shutdown_does() {
    for line in ["-action shutdown=pause", "-no-shutdown"] {
        let a = actions(line);
        assert_eq!((a.shutdown, a.reboot, a.panic), (Stay, End, End));
        let a = actions(&format!("{line} -action reboot=shutdown,panic=shutdown"));
        assert_eq!((a.shutdown, a.reboot, a.panic), (Stay, Stay, Stay));
    }
}

#[test]
fn the_file_says_it_as_domains_do() {
    let a = domain(r#"{"on_poweroff":"preserve","on_reboot":"restart","on_crash":"destroy"}"#, "");
    assert_eq!((a.shutdown, a.reboot, a.panic, a.panic_status), (Stay, Reset, End, 1));
    assert!(!a.fault_panics);
    let a = domain(r#"{"on_poweroff":"rename-restart","on_crash":"rename-restart"}"#, "");
    assert!(a.fault_panics, "a crash, where crashes are looked into");
    assert_eq!((a.shutdown, a.reboot, a.panic), (Stay, End, Stay));
    let flags = "-action shutdown=poweroff,panic=reset";
    let a = domain(r#"{"on_poweroff":"preserve","on_reboot":"preserve"}"#, flags);
    assert_eq!((a.shutdown, a.reboot, a.panic), (End, Stay, Reset), "flags replace the file's");
    let wrong = r#"{"boot-source":{"kernel_image_path":"k"},"domain":{"on_reboot":"reset"}}"#;
    assert!(file_problems(wrong)[0].contains("destroy|restart|preserve|rename-restart"));
}
