#!/bin/sh
# Fetch an archive that its host serves in numbered parts, and join it.
#
#     ./download_data.sh NAME OUTPUT FIRST LAST
#     ./download_data.sh raw_data raw_data_yfcc.tar.gz 0 8
#
# The second is YFCC100M for evaluation, to be unpacked with tar -xf raw_data_yfcc.tar.gz.
#
# Parts are $BASE_URL/NAME.tar.000 and so on, FIRST to LAST inclusive. They lie beside OUTPUT until the joined archive
# tests good. It can be stopped at any moment: a second run resumes where it was, and does nothing if OUTPUT is there.
#
#     BASE_URL   where the parts are; by default OANet's host
#     CHECKSUMS  a file as sha256sum writes it, which names every part: each is then compared
#
# Exit status: 0 done, 1 a download failed (what has arrived is kept), 2 bad arguments.
set -u

BASE_URL=${BASE_URL:-https://research.altizure.com/data/oanet_data}
CHECKSUMS=${CHECKSUMS:-}
TRIES=4

fail() {
    status=$1
    shift
    echo "error: $*" >&2
    exit "$status"
}

# Prints the status of the last answer to a HEAD request and its Content-Length; nothing if no server answers.
probe() {
    if [ "$client" = curl ]; then
        curl -sIL --connect-timeout 20 --max-time 60 "$1"
    else
        wget -q -S --spider -t 1 -T 60 "$1" 2>&1
    fi | tr -d '\r' | awk '
        $1 ~ /^HTTP\// { status = $2; length_ = "" }
        tolower($1) == "content-length:" { length_ = $2 }
        END { print status, length_ }'
}

# Resumes the file $2 from the end of what it holds.
fetch() {
    if [ "$client" = curl ]; then
        curl -fL "$curl_progress" -C - --connect-timeout 20 --speed-limit 1 --speed-time 60 -o "$2" "$1"
    else
        wget -q $wget_progress -c -t 1 -T 60 -O "$2" "$1"
    fi
}

size_of() {
    if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi
}

sha256_of() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# Prints the checksum that the list has for a file name.
listed_checksum() {
    awk -v name="$1" '
        { file = $2; sub(/^\*/, "", file); sub(/.*\//, "", file) }
        file == name { print tolower($1); exit }' "$CHECKSUMS"
}

download_part() {
    url=$BASE_URL/$1
    partial=$folder/$1.partial
    try=1
    while :; do
        # shellcheck disable=SC2046  # two words
        set -- "$1" $(probe "$url")
        answer=${2:-}
        length=${3:-}
        case $answer in
        2* | 405 | 501) # a server need not know HEAD
            [ "$answer" = "${answer#2}" ] && length=
            if [ -n "$length" ] && [ "$(size_of "$partial")" -gt "$length" ]; then
                rm "$partial" # of another file of that name: it cannot be resumed
            fi
            fetch "$url" "$partial"
            outcome=$?
            if [ -n "$length" ]; then
                [ "$(size_of "$partial")" -eq "$length" ] && break
            elif [ $outcome -eq 0 ]; then
                break
            fi
            # 33: the server cannot serve a file from the middle
            if [ "$client" = curl ] && [ $outcome -eq 33 ]; then rm -f "$partial"; fi
            problem="$url broke off after $(size_of "$partial") of ${length:-an unknown number of} bytes"
            ;;
        4*)
            fail 1 "$url is not there (HTTP $answer): check NAME, FIRST and LAST, or name another host in BASE_URL"
            ;;
        '')
            problem="no answer from $BASE_URL: the host is gone, or there is no network; another one that has the \
parts can be named in BASE_URL"
            ;;
        *)
            problem="$url cannot be had now (HTTP $answer)"
            ;;
        esac
        [ $try -lt $TRIES ] || fail 1 "$problem; what has arrived is kept: run again to resume"
        echo "$1: try $try of $TRIES failed" >&2
        sleep $((2 * try))
        try=$((try + 1))
    done
    mv "$partial" "$folder/$1" || fail 1 "cannot write $folder/$1"
}

check_part() {
    wanted=$(listed_checksum "$1")
    [ "$(sha256_of "$folder/$1")" = "$wanted" ] ||
        fail 1 "$folder/$1 has not the checksum that $CHECKSUMS gives: delete it and run again"
}

test_archive() {
    case $output in
    *.tar | *.tar.* | *.tgz) tar -tf "$1" >/dev/null ;; # tar finds out how it is compressed, whatever the name says
    *.gz) gzip -t <"$1" ;;
    *) echo "$output: not tested, its name is not an archive's" >&2 ;;
    esac
}

usage() {
    fail 2 "$1; usage: $0 NAME OUTPUT FIRST LAST, as in: $0 raw_data raw_data_yfcc.tar.gz 0 8"
}

[ $# -eq 4 ] || usage "4 arguments are needed, not $#"
name=$1
output=$2
for number in "$3" "$4"; do
    case $number in
    '' | *[!0-9]* | ????*) usage "FIRST and LAST must be numbers from 0 to 999, not '$number'" ;;
    esac
done
case $name in
'' | */*) usage "NAME must be the parts' name without folder, not '$name'" ;;
esac
first=$(expr "$3" + 0) # decimal even with leading zeros
last=$(expr "$4" + 0)
[ "$first" -le "$last" ] || usage "FIRST ($first) is after LAST ($last)"
if [ -z "$output" ] || [ -d "$output" ]; then usage "OUTPUT must be a file, not '$output'"; fi

if [ -f "$output" ]; then
    echo "$output is there: nothing to do"
    exit 0
fi

if command -v curl >/dev/null; then
    client=curl
elif command -v wget >/dev/null; then
    client=wget
else
    fail 2 "neither curl nor wget is installed"
fi
curl_progress=-sS
wget_progress=
if [ -t 2 ]; then
    curl_progress=-#
    wget_progress=--show-progress
fi

folder=$(dirname "$output")
mkdir -p "$folder" || fail 2 "cannot write to $folder"
parts=
number=$first
while [ "$number" -le "$last" ]; do
    parts="$parts $(printf '%03d' "$number")"
    number=$((number + 1))
done
if [ -n "$CHECKSUMS" ]; then
    [ -r "$CHECKSUMS" ] || fail 2 "cannot read CHECKSUMS=$CHECKSUMS"
    for number in $parts; do
        [ -n "$(listed_checksum "$name.tar.$number")" ] || fail 2 "$CHECKSUMS does not name $name.tar.$number"
    done
fi

for number in $parts; do
    part=$name.tar.$number
    if [ ! -f "$folder/$part" ]; then
        echo "$part"
        download_part "$part"
    fi
    if [ -n "$CHECKSUMS" ]; then check_part "$part"; fi
done

joined=$folder/.$(basename "$output").tmp
trap 'rm -f "$joined"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for number in $parts; do
    cat "$folder/$name.tar.$number" || exit 1
done >"$joined" || fail 1 "cannot write $joined (disk full?); the parts are kept"
test_archive "$joined" ||
    fail 1 "the parts do not make a whole archive; they are kept in $folder: delete the bad ones and run again \
(a list in CHECKSUMS tells which)"
mv "$joined" "$output" || fail 1 "cannot write $output; the parts are kept"
for number in $parts; do
    rm -f "$folder/$name.tar.$number"
done
echo "$output is complete"
