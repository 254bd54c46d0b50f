#!/usr/bin/env bash
# Installs grainwatch as a service: its own environment, user, units, an example configuration and
# compiled kernels. Run again, it brings everything up to date and touches no configuration.
set -euo pipefail
umask 022

usage() {
    cat <<END
Usage: deploy/install.sh [OPTIONS]

Installs grainwatch from this checkout as a systemd service, grainwatch@NAME.

  --name NAME      of the daemon: its configuration is /etc/grainwatch/NAME.toml [beamline]
  --prefix DIR     holds the environment, DIR/venv [/opt/grainwatch]
  --python PYTHON  makes the environment; 3.11 or newer [the first one found]
  --wheel FILE     installs this instead of the checkout
  --no-warm        leaves the compilation of kernels to the first start
  --root DIR       puts everything below DIR, creates no user and starts nothing: for a trial
  --dry-run        says what would be done and changes nothing
  --uninstall      stops and removes the service; keeps configurations, results and accounts
  --purge          with --uninstall: removes these, too
  -h, --help       this
END
}

fail() {
    echo "install.sh: $*" >&2
    exit 2
}

name=beamline prefix=/opt/grainwatch python='' wheel='' root='' dry='' action=install purge='' warm=yes
while [ $# -gt 0 ]; do
    case $1 in
    --name | --prefix | --python | --wheel | --root)
        [ $# -ge 2 ] || fail "$1: a value is missing"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    --dry-run) dry=yes ;;
    --no-warm) warm='' ;;
    --uninstall) action=uninstall ;;
    --purge) purge=yes ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) fail "$1: unknown option (--help lists them)" ;;
    esac
    shift
done

[[ $name =~ ^[A-Za-z0-9_.-]{1,64}$ ]] || fail "--name: expected letters, digits, dot, - and _, got '$name'"
[[ $prefix =~ ^/[A-Za-z0-9_./-]+$ && /$prefix/ != */../* ]] || fail "--prefix: expected a plain absolute path, got '$prefix'"
[ -z "$purge" ] || [ $action = uninstall ] || fail "--purge: only together with --uninstall"
if [ -n "$root" ]; then
    [ -d "$root" ] || fail "--root: $root is not a folder"
    root=$(cd "$root" && pwd -P)
    [ "$root" != / ] || root=''
fi
if [ -z "$root" ] && [ -z "$dry" ] && [ "$(id -u)" -ne 0 ]; then
    fail "run it as root, or with --dry-run or --root DIR to see what it does"
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root$prefix/venv
units=$root/usr/local/lib/systemd/system
etc=$root/etc/grainwatch
state=$root/var/lib/grainwatch
cache=$root/var/cache/grainwatch
link=$root/usr/local/bin/grainwatch

# Does, or says, one thing.
run() {
    echo "  $*"
    [ -n "$dry" ] || "$@"
}

# Writes standard input to a file, unless that is what it holds: write FILE
write() {
    local text
    text=$(cat)
    if [ -f "$1" ] && [ "$text" = "$(cat "$1")" ]; then
        echo "  $1 is as it should be"
        return
    fi
    echo "  write $1"
    [ -z "$dry" ] || return 0
    mkdir -p "$(dirname "$1")"
    printf '%s\n' "$text" >"$1.new"
    chmod 0644 "$1.new"
    mv "$1.new" "$1"
}

remove() {
    local path
    for path in "$@"; do
        [ ! -e "$path" ] && [ ! -L "$path" ] || run rm -rf -- "$path"
    done
}

# Whether this is the running system, with systemd in charge of it.
live() {
    [ -z "$root" ] && [ -d /run/systemd/system ]
}

find_python() {
    local check='
import ensurepip, os, sys, venv
at_home = os.path.realpath(sys.executable).startswith(("/root/", "/home/"))
print("good" if sys.version_info >= (3, 11) and (sys.argv[1] or not at_home) else "")'
    local candidate
    local candidates=(python3.13 python3.12 python3.11 python3 /usr/bin/python3)
    [ -z "$python" ] || candidates=("$python")
    for candidate in "${candidates[@]}"; do
        if [ "$("$candidate" -c "$check" "$root" 2>/dev/null || true)" = good ]; then
            command -v "$candidate"
            return
        fi
    done
    fail "expected Python 3.11 or newer with venv and ensurepip, outside of home folders, which the service" \
        "cannot see; got ${python:-none}: install one (Debian, Ubuntu: apt install python3-venv) or name it" \
        "with --python"
}

install_all() {
    local what=${wheel:-$(dirname "$here")}
    if [ -n "$wheel" ]; then
        [ -f "$wheel" ] || fail "--wheel: $wheel is not a file"
        what=$(cd "$(dirname "$wheel")" && pwd -P)/$(basename "$wheel")
    fi
    local interpreter
    interpreter=$(find_python)

    echo "environment $venv, by $interpreter:"
    [ -x "$venv/bin/python" ] || run "$interpreter" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet install)
    run "${pip[@]}" -c "$(dirname "$here")/constraints.txt" "${what}[daemon]"
    # pip leaves a wheel of the version that is there already.
    [ -z "$wheel" ] || run "${pip[@]}" --no-deps --force-reinstall "$what"
    if [ "$(readlink "$link" || true)" != "$prefix/venv/bin/grainwatch" ]; then
        [ ! -e "$link" ] || fail "$link is there already and is not of grainwatch"
        run mkdir -p "$(dirname "$link")"
        run ln -sfn "$prefix/venv/bin/grainwatch" "$link"
    fi

    echo "user and folders:"
    write "$root/usr/local/lib/sysusers.d/grainwatch.conf" <"$here/sysusers.d/grainwatch.conf"
    write "$root/usr/local/lib/tmpfiles.d/grainwatch.conf" <"$here/tmpfiles.d/grainwatch.conf"
    if [ -z "$root" ]; then
        local tool
        for tool in systemd-sysusers systemd-tmpfiles; do
            command -v $tool >/dev/null || [ -n "$dry" ] || fail "$tool is missing: is systemd installed?"
        done
        run systemd-sysusers grainwatch.conf
        run systemd-tmpfiles --create grainwatch.conf
    else
        run mkdir -p "$etc" "$state" "$cache"
    fi

    echo "unit:"
    sed "s|/opt/grainwatch/|$prefix/|g" "$here/systemd/grainwatch@.service" | write "$units/grainwatch@.service"
    ! live || run systemctl daemon-reload

    echo "configuration:"
    if [ -f "$etc/$name.toml" ]; then
        echo "  $etc/$name.toml stays as it is"
    else
        sed -e "s|\"/var/lib/grainwatch\"|\"/var/lib/grainwatch/$name\"|" \
            -e "s|\"/run/grainwatch\"|\"/run/grainwatch/$name\"|" \
            -e "s|\"/data/results\"|\"/var/lib/grainwatch/$name/results\"|" \
            -e "s|one-detector.toml|/etc/grainwatch/$name.toml|" \
            -e "s|name = \"beamline\"|name = \"$name\"|" \
            "$here/examples/one-detector.toml" | write "$etc/$name.toml"
    fi

    if [ -n "$warm" ]; then
        echo "kernels, into $cache (about a minute the first time):"
        local compile=(env "GRAINWATCH_CACHE_DIR=$cache" "$venv/bin/grainwatch" warm)
        # They belong to the user who runs them.
        [ -n "$root" ] || compile=(runuser -u grainwatch -- "${compile[@]}")
        (cd / && run "${compile[@]}")
    fi

    echo "next: put the detector's calibration and address into $etc/$name.toml, check it with"
    echo "  grainwatch check-config $etc/$name.toml"
    echo "and start the service with"
    echo "  systemctl enable --now grainwatch@$name"
    ! live || running | sed 's/^/runs the earlier version until: systemctl restart /'
}

# Lists the daemons that run.
running() {
    systemctl list-units --plain --no-legend 'grainwatch@*.service' | awk '{ print $1 }'
}

uninstall_all() {
    echo "service:"
    if live; then
        local unit
        for unit in $(running); do
            run systemctl disable --now "$unit"
        done
    fi
    # Those that are enabled and do not run.
    remove "$root"/etc/systemd/system/*.wants/grainwatch@*.service
    remove "$units/grainwatch@.service" "$root/usr/local/lib/sysusers.d/grainwatch.conf" \
        "$root/usr/local/lib/tmpfiles.d/grainwatch.conf"
    ! live || run systemctl daemon-reload
    echo "program and cache:"
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
        fail "$venv is no Python environment: not removed"
    fi
    remove "$venv" "$cache"
    [ "$(readlink "$link" || true)" != "$prefix/venv/bin/grainwatch" ] || remove "$link"
    if [ -d "$root$prefix" ] && [ -z "$dry" ]; then
        rmdir --ignore-fail-on-non-empty "$root$prefix"
    fi
    if [ -n "$purge" ]; then
        echo "configurations, results, accounts:"
        remove "$etc" "$state"
    else
        echo "kept: $etc, $state (--purge removes them)"
    fi
    echo "the user grainwatch stays: files may belong to it"
}

[ -z "$dry" ] || echo "dry run: nothing is changed"
"${action}_all"
