#!/bin/sh
# A witness of the user's: records are files beside it, made with link(2) like those of `dir:`.
dir=${0%/*}/records
mkdir -p "$dir"
verb=$1 lineage=$2 term=$3
file=$dir/$lineage.$term

# Makes a file with a text, unless there is one.
make() {
    new=$(mktemp "$dir/new.XXXXXX")
    printf %s "$2" >"$new"
    ln "$new" "$1" 2>/dev/null
    rm "$new"
}

later() {
    for known in "$dir/$lineage".*; do
        known=${known##*.}
        case $known in '' | *[!0-9]*) continue ;; esac
        [ "$known" -gt "$term" ] && return 0
    done
    return 1
}

show() {
    if [ -e "$file" ]; then
        printf '%s%s}\n' "$(cat "$file")" "$(cat "$file.next" 2>/dev/null)"
    elif later; then
        echo superseded
    else
        echo open
    fi
}

case $verb in
identify) echo exec:test ;;
look) show ;;
claim)
    [ -e "$file" ] || later ||
        make "$file" "{\"word\":\"$4\",\"side\":\"$5\",\"incarnation\":\"$6\""
    show
    grep -q "\"incarnation\":\"$6\"" "$file" 2>/dev/null || exit 1
    ;;
settle)
    text=",\"settled\":\"$5\""
    [ -z "$6" ] || text="$text,\"yielded-to\":\"$6\""
    grep -q "\"promote\".*\"incarnation\":\"$4\"" "$file" 2>/dev/null && make "$file.next" "$text"
    show
    [ "$(cat "$file.next" 2>/dev/null)" = "$text" ] && grep -q "\"$4\"" "$file" || exit 1
    ;;
esac
