#!/bin/sh
# What a unit of the virtual machine runs at each boot, until the machine is off.
# Says `VM NAME ok` or `VM NAME failed` for each claim.
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive SYSTEMD_URLIFY=0 SYSTEMD_COLORS=0
stage=$(cat /var/lib/stage 2>/dev/null || echo 1)

claim() {
    name=$1
    shift
    if "$@" >/run/out 2>&1; then
        echo "VM $name ok"
    else
        echo "VM $name failed"
        cat /run/out
    fi
}
not() { ! "$@"; }
soon() {
    for _ in $(seq 1 60); do
        "$@" && return
        sleep 1
    done
    return 1
}
property() { systemctl show --property "$1" --value "${2:-mcp-sensor.service}"; }
active() { [ "$(property ActiveState)" = active ]; }

to="--to 127.0.0.1 --port 7001"
reaches() { "$@" tcp-connect $to | tee /dev/stderr | grep -q '"outcome":"done"'; }
refused() { "$@" tcp-connect $to | tee /dev/stderr | grep -q '"errno":1\b'; }
watch() {
    rm -f /run/frames
    tcpdump -Z root -i lo -U -w /run/frames port 7001 2>/run/tcpdump &
    watching=$!
    soon grep -q listening /run/tcpdump
}
seen() {
    sleep 2
    kill "$watching"
    wait "$watching"
    tcpdump -r /run/frames 2>/dev/null | wc -l
}
# A command during which no frame of the held server leaves.
silent() {
    watch
    "$@"
    done=$?
    frames=$(seen)
    echo "$frames frames"
    [ "$done" = 0 ] && [ "$frames" = 0 ]
}
# Tries without end, meanwhile something happens; no try gets through.
hammered() {
    watch
    while :; do
        /usr/local/bin/server tcp-connect $to
        /usr/local/bin/server udp-sendto $to
    done >/run/tries 2>&1 &
    hammering=$!
    "$@"
    done=$?
    kill "$hammering"
    wait "$hammering"
    frames=$(seen)
    echo "$frames frames, $(grep -c '"errno":1\b' /run/tries) refusals"
    [ "$done" = 0 ] && [ "$frames" = 0 ] && grep -q '"errno":1\b' /run/tries && not grep -q '"outcome":"done"' /run/tries
}

capabilities() {
    status=/proc/$(property MainPID)/status
    cat "$status"
    [ "$(sed -n 's/^Uid:\t\([0-9]*\).*/\1/p' "$status")" = "$(id -u mcp-sensor)" ] &&
        [ "$(sed -n 's/^CapEff:\t//p' "$status")" = 000000c000081024 ]
}
upgrade() { dpkg -i /var/tmp/upgrade.deb && soon active && [ "$(property MainPID)" != "$before" ]; }
hang() {
    before=$(property MainPID)
    restarts=$(property NRestarts)
    kill -STOP "$before"
    soon restarted
}
restarted() { active && [ "$(property NRestarts)" -gt "$restarts" ] && [ "$(property MainPID)" != "$before" ]; }
started_before() {
    own=$(property ActiveEnterTimestampMonotonic)
    other=$(property ActiveEnterTimestampMonotonic "$1")
    echo "mcp-sensor.service $own, $1 $other"
    [ "$own" -gt 0 ] && [ "$other" -gt "$own" ]
}

soon reaches /usr/local/bin/attempt >/dev/null 2>&1
case $stage in
1)
    echo "VM kernel $(uname -r), $(systemctl --version | head -n 1)"
    claim before_the_package_the_server_gets_through reaches /usr/local/bin/server
    claim the_package_is_installed dpkg -i /var/tmp/package.deb
    claim its_sensor_is_active active
    claim it_runs_as_its_user_with_six_capabilities capabilities
    claim its_status_says_what_is_in_force sh -c 'systemctl status --no-pager mcp-sensor.service | grep -q "Status: \"policy .* is in force\""'
    claim the_control_socket_answers mcp-sensor status
    mcp-sensor status
    systemctl status --no-pager mcp-sensor.service
    systemd-analyze --no-pager security mcp-sensor.service | tail -n 1
    claim under_the_first_policy_the_server_gets_through reaches /usr/local/bin/server
    cat >/etc/mcp-sensor/policy.yaml <<'END'
version: 1
servers:
  - {name: held, profile: none, mode: enforce, match: [{exe: /usr/local/bin/server}]}
unknown: {profile: none, mode: audit}
END
    claim a_reload_puts_the_policy_in_force systemctl reload mcp-sensor.service
    claim the_server_is_refused_and_sends_nothing silent refused /usr/local/bin/server
    claim others_get_through reaches /usr/local/bin/attempt
    claim its_denial_is_an_event soon sh -c 'mcp-sensor events --verdict deny --server held -o json | grep -q 7001'
    cp /etc/mcp-sensor/policy.yaml /var/tmp/good.yaml
    echo "servers: what" >/etc/mcp-sensor/policy.yaml
    claim a_bad_policy_fails_the_reload not systemctl reload mcp-sensor.service
    claim the_sensor_is_active_all_the_same active
    claim the_server_is_refused_still silent refused /usr/local/bin/server
    cp /var/tmp/good.yaml /etc/mcp-sensor/policy.yaml
    claim the_good_policy_is_loaded_again systemctl reload mcp-sensor.service
    mkdir -p /etc/systemd/system/mcp-sensor.service.d
    printf '[Service]\nWatchdogSec=15\n' >/etc/systemd/system/mcp-sensor.service.d/watchdog.conf
    systemctl daemon-reload
    claim a_restart_lets_nothing_through hammered systemctl restart mcp-sensor.service
    claim a_sensor_that_hangs_is_restarted_and_lets_nothing_through hammered hang
    systemctl enable early.service
    echo 2 >/var/lib/stage
    systemctl reboot
    ;;
2)
    claim after_a_reboot_the_sensor_is_active active
    claim it_was_ready_before_the_network started_before network-pre.target
    claim it_was_ready_before_services_start started_before sysinit.target
    claim a_server_of_the_boot_was_refused grep -q '"errno":1\b' /var/lib/early
    cat /var/lib/early
    claim after_a_reboot_the_server_is_refused silent refused /usr/local/bin/server
    before=$(property MainPID)
    claim an_upgrade_lets_nothing_through hammered upgrade
    claim the_policy_outlives_the_upgrade grep -q held /etc/mcp-sensor/policy.yaml
    claim the_collector_starts systemctl start mcp-sensor-collector.service
    claim it_is_supervised sh -c 'systemctl status --no-pager mcp-sensor-collector.service | grep -q "Status: \"listening on"'
    printf 'MCP_SENSOR_COLLECTOR=http://127.0.0.1:7117\nMCP_SENSOR_SENSOR=of-the-vm\n' >/etc/mcp-sensor/conf.d/20-feed.conf
    claim an_option_is_taken_from_conf_d systemctl restart mcp-sensor.service
    claim the_collector_gets_the_events soon sh -c 'mcp-sensor fleet --collector http://127.0.0.1:7117 | grep -q of-the-vm'
    mcp-sensor fleet --collector http://127.0.0.1:7117
    echo "memory $(property MemoryCurrent)"
    claim the_package_is_removed dpkg -r mcp-sensor
    claim nothing_is_enforced_any_more soon reaches /usr/local/bin/server
    claim nothing_is_pinned_any_more not test -e /sys/fs/bpf/mcp_sensor
    claim it_is_purged dpkg -P mcp-sensor
    journalctl --no-pager -u mcp-sensor.service -p warning
    systemctl poweroff
    ;;
esac
