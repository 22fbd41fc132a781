package pgfake

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
)

// postgresEpoch is where timestamps count from.
var postgresEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// begin and end frame a message: its length is known when it is written.
func begin(b []byte, typ byte) ([]byte, int) {
	return append(b, typ, 0, 0, 0, 0), len(b) + 1
}

func end(b []byte, at int) []byte {
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at))
	return b
}

func appendTag(b []byte, tag string) []byte {
	b, at := begin(b, 'C')
	b = append(b, tag...)
	return end(append(b, 0), at)
}

func appendError(b []byte, e *Error) []byte {
	severity := e.Severity
	if severity == "" {
		severity = "ERROR"
	}
	b, err := (&pgproto3.ErrorResponse{
		Severity: severity, SeverityUnlocalized: severity, Code: e.Code, Message: e.Message, Detail: e.Detail, Hint: e.Hint,
		File: "postgres.c", Line: 1, Routine: cmp.Or(e.Routine, "errfinish"), // a server sends all three, always
	}).Encode(b)
	if err != nil {
		panic(err) // a message that is longer than the protocol allows
	}
	return b
}

func appendRowDescription(b []byte, columns []Column, formats []int16) []byte {
	b, at := begin(b, 'T')
	b = binary.BigEndian.AppendUint16(b, uint16(len(columns)))
	for i, c := range columns {
		b = append(b, c.Name...)
		b = append(b, 0, 0, 0, 0, 0, 0, 0) // the end of the name; no table, no attribute
		b = binary.BigEndian.AppendUint32(b, c.oid())
		b = binary.BigEndian.AppendUint16(b, uint16(c.size()))
		b = append(b, 0xff, 0xff, 0xff, 0xff)
		b = binary.BigEndian.AppendUint16(b, uint16(formatOf(formats, i)))
	}
	return end(b, at)
}

func (c Column) oid() uint32 {
	if c.OID == 0 {
		return Int4OID
	}
	return c.OID
}

func (c Column) size() int16 {
	switch c.oid() {
	case BoolOID:
		return 1
	case Int2OID:
		return 2
	case Int4OID, OIDOID:
		return 4
	case Int8OID, Float8OID, TimestamptzOID, LSNOID:
		return 8
	}
	return -1
}

// appendRow sends columns that a row lacks as NULL.
func appendRow(b []byte, columns []Column, formats []int16, values []any) []byte {
	b, at := begin(b, 'D')
	b = binary.BigEndian.AppendUint16(b, uint16(len(columns)))
	for i, c := range columns {
		var v any
		if i < len(values) {
			v = values[i]
		}
		if v == nil {
			b = append(b, 0xff, 0xff, 0xff, 0xff)
			continue
		}
		field := len(b)
		b = append(b, 0, 0, 0, 0)
		if formatOf(formats, i) == 1 {
			b = appendBinary(b, c.oid(), v)
		} else {
			b = appendText(b, v)
		}
		binary.BigEndian.PutUint32(b[field:], uint32(len(b)-field-4))
	}
	return end(b, at)
}

func appendText(b []byte, v any) []byte {
	switch v := v.(type) {
	case string:
		return append(b, v...)
	case []byte:
		b = append(b, `\x`...)
		return hex.AppendEncode(b, v)
	case bool:
		if v {
			return append(b, 't')
		}
		return append(b, 'f')
	case float64:
		return strconv.AppendFloat(b, v, 'g', -1, 64)
	case time.Time:
		return v.AppendFormat(b, "2006-01-02 15:04:05.999999-07:00")
	}
	return fmt.Append(b, v)
}

// appendBinary falls back to the text of a value that does not fit its column; for text-like types that is their binary
// form.
func appendBinary(b []byte, oid uint32, v any) []byte {
	switch oid {
	case Int2OID, Int4OID, Int8OID, OIDOID:
		n, ok := integer(v)
		switch {
		case !ok:
		case oid == Int2OID:
			return binary.BigEndian.AppendUint16(b, uint16(n))
		case oid == Int8OID:
			return binary.BigEndian.AppendUint64(b, uint64(n))
		default:
			return binary.BigEndian.AppendUint32(b, uint32(n))
		}
	case BoolOID:
		switch v {
		case true, "t", "true", "on":
			return append(b, 1)
		case false, "f", "false", "off":
			return append(b, 0)
		}
	case Float8OID:
		switch v := v.(type) {
		case float64:
			return binary.BigEndian.AppendUint64(b, math.Float64bits(v))
		case string:
			if f, err := strconv.ParseFloat(v, 64); err == nil {
				return binary.BigEndian.AppendUint64(b, math.Float64bits(f))
			}
		}
		if n, ok := integer(v); ok {
			return binary.BigEndian.AppendUint64(b, math.Float64bits(float64(n)))
		}
	case TimestamptzOID:
		if t, ok := v.(time.Time); ok {
			return binary.BigEndian.AppendUint64(b, uint64(t.Sub(postgresEpoch).Microseconds()))
		}
	case LSNOID:
		if s, ok := v.(string); ok {
			var high, low uint32
			if _, err := fmt.Sscanf(s, "%X/%X", &high, &low); err == nil {
				return binary.BigEndian.AppendUint64(b, uint64(high)<<32|uint64(low))
			}
		}
		if n, ok := integer(v); ok {
			return binary.BigEndian.AppendUint64(b, uint64(n))
		}
	case ByteaOID:
		if v, ok := v.([]byte); ok {
			return append(b, v...)
		}
	case 3802: // jsonb, whose binary form is its text after a version
		b = append(b, 1)
	}
	if v, ok := v.([]byte); ok {
		return append(b, v...)
	}
	return appendText(b, v)
}

func integer(v any) (int64, bool) {
	switch v := v.(type) {
	case int:
		return int64(v), true
	case int16:
		return int64(v), true
	case int32:
		return int64(v), true
	case int64:
		return v, true
	case uint32:
		return int64(v), true
	case uint64:
		return int64(v), true
	case string:
		n, err := strconv.ParseInt(v, 10, 64)
		return n, err == nil
	}
	return 0, false
}

// textOf is a parameter in text form; types that it does not know stay as they are.
func textOf(oid uint32, b []byte) []byte {
	switch {
	case oid == BoolOID && len(b) == 1:
		return appendText(nil, b[0] == 1)
	case oid == Int2OID && len(b) == 2:
		return strconv.AppendInt(nil, int64(int16(binary.BigEndian.Uint16(b))), 10)
	case oid == Int4OID && len(b) == 4:
		return strconv.AppendInt(nil, int64(int32(binary.BigEndian.Uint32(b))), 10)
	case oid == Int8OID && len(b) == 8:
		return strconv.AppendInt(nil, int64(binary.BigEndian.Uint64(b)), 10)
	case oid == Float8OID && len(b) == 8:
		return appendText(nil, math.Float64frombits(binary.BigEndian.Uint64(b)))
	}
	return b
}
